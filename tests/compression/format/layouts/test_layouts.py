"""Layouts: interpolative equals pair, stores r² parameters fewer, and ranks respect the budget."""

import pytest
import torch

from svdserve.compression.format.layouts import (
    INTERPOLATIVE,
    LAYOUTS,
    PAIR,
    Factors,
    Layout,
    get_layout,
)
from svdserve.compression.system.errors import UserError
from svdserve.kernels import lowrank_linear
from svdserve.kernels.parts import other_channels
from svdserve.kernels.reference import project

SHAPES = [(12, 20, 5), (20, 12, 11), (7, 7, 7), (9, 30, 1), (30, 9, 9)]
BOTH = pytest.mark.parametrize("layout", [PAIR, INTERPOLATIVE], ids=lambda layout: layout.name)


def random_pair(m: int, n: int, r: int, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(m * n + r)
    return Factors(
        factor_in=torch.randn(r, n, generator=generator, dtype=dtype),
        factor_out=torch.randn(m, r, generator=generator, dtype=dtype),
    )


def test_names_are_those_of_the_registry() -> None:
    assert sorted(LAYOUTS) == ["interpolative", "pair"]
    assert (get_layout("pair"), get_layout("interpolative")) == (PAIR, INTERPOLATIVE)
    with pytest.raises(UserError, match=r"^unknown layout 'cube'; allowed: interpolative, pair$"):
        get_layout("cube")


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)]
)
def test_interpolative_equals_pair(m: int, n: int, r: int, dtype: torch.dtype, tolerance: float):
    pair = random_pair(m, n, r)
    want = pair.factor_out @ pair.factor_in
    tensors = INTERPOLATIVE.encode(pair)
    tensors |= {name: tensors[name].to(dtype) for name in INTERPOLATIVE.matrices}
    got = INTERPOLATIVE.dense(tensors)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@BOTH
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_encoded_tensors_are_those_that_the_layout_lists(layout: Layout, m: int, n: int, r: int):
    pair = random_pair(m, n, r)
    tensors = layout.encode(pair)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == layout.shapes(m, n, r)
    assert set(tensors) == {*layout.matrices, *layout.indices}
    assert layout.rank(tensors) == r
    assert sum(tensors[name].numel() for name in layout.matrices) == layout.parameters(m, n, r)
    layout.check_indices(tensors, n)
    torch.testing.assert_close(layout.dense(tensors), pair.dense())
    x = torch.randn(3, n, dtype=torch.float64)
    part = layout.part(tensors)
    assert (part.outputs, part.in_features) == (m, n)
    passing = 0 if part.pivots is None else len(part.pivots)
    assert layout.passing(r) == passing
    torch.testing.assert_close(layout.latent(x, tensors) @ part.factor_out.T, x @ pair.dense().T)
    assert torch.equal(layout.latent(x, tensors), project(x, part.factor_in, part.pivots))


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_interpolative_stores_r_squared_fewer(m: int, n: int, r: int):
    pair = random_pair(m, n, r)
    inter = INTERPOLATIVE.encode(pair)
    stored = [t["factor_in"].numel() + t["factor_out"].numel() for t in (PAIR.encode(pair), inter)]
    assert stored == [r * (m + n), r * (m + n) - r * r]
    assert stored == [layout.parameters(m, n, r) for layout in (PAIR, INTERPOLATIVE)]
    assert inter["pivots"].dtype == torch.int32
    assert len(set(inter["pivots"].tolist())) == r


def test_pivot_columns_are_stored_exactly():
    pair = random_pair(12, 20, 5)
    inter = INTERPOLATIVE.encode(pair)
    torch.testing.assert_close(inter["factor_out"], pair.dense()[:, inter["pivots"].long()])


def test_dependent_rows_lower_the_rank_without_loss():
    pair = random_pair(12, 20, 4)
    repeated = Factors(
        factor_in=torch.cat([pair.factor_in, pair.factor_in[:2]]),
        factor_out=torch.cat([pair.factor_out, pair.factor_out[:, 1:3]], dim=1),
    )
    inter = INTERPOLATIVE.encode(repeated)
    assert INTERPOLATIVE.rank(inter) == 4
    torch.testing.assert_close(INTERPOLATIVE.dense(inter), repeated.dense())


def test_other_channels_are_the_complement_in_order():
    assert other_channels(torch.tensor([4, 1]), 6).tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize(
    ("pivots", "message"),
    [([0, 5], r"pivots must lie in 0\.\.4"), ([-1, 2], "pivots must lie"), ([3, 3], "repeated")],
)
def test_pivots_that_fit_no_input_are_refused(pivots: list[int], message: str):
    tensors = {"pivots": torch.tensor(pivots, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        INTERPOLATIVE.check_indices(tensors, 5)
    INTERPOLATIVE.check_indices({"pivots": torch.tensor([4, 0], dtype=torch.int32)}, 5)
    PAIR.check_indices({}, 5)


@BOTH
@pytest.mark.parametrize(("m", "n"), [(576, 576), (960, 576), (576, 1536), (192, 576), (3, 5)])
@pytest.mark.parametrize("keep", [0.1, 0.4, 0.8, 0.97])
def test_rank_is_the_largest_within_the_budget(layout: Layout, m: int, n: int, keep: float):
    rank = layout.rank_for_keep(m, n, keep)
    assert rank is not None
    assert rank == 1 or layout.parameters(m, n, rank) <= keep * m * n
    full = rank == min(m, n)
    assert full or layout.parameters(m, n, rank + 1) > keep * m * n


@BOTH
def test_factors_as_large_as_the_weight_stay_dense(layout: Layout):
    assert layout.rank_for_keep(64, 64, 1.0) is None
    # A single row costs more as two factors than as itself.
    assert PAIR.rank_for_keep(1, 8, 0.99) is None


def test_published_rank_of_a_square_matrix():
    """design.md: 0.553 d instead of 0.4 d at κ = 0.8."""
    assert PAIR.rank_for_keep(1000, 1000, 0.8) == 400
    assert INTERPOLATIVE.rank_for_keep(1000, 1000, 0.8) == 552


class Searched(Layout):
    """Costs of another layout, with the search that a layout without a closed form inherits."""

    name = "searched"

    def __init__(self, costs: Layout) -> None:
        self.costs = costs

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return self.costs.shapes(m, n, r)

    def encode(self, factors: Factors) -> dict[str, torch.Tensor]:
        return self.costs.encode(factors)


@BOTH
def test_the_search_for_a_rank_is_the_closed_form(layout: Layout):
    searched = Searched(layout)
    sizes = [*range(1, 14), 17, 32, 63, 64, 192, 576, 1000, 1536]
    keeps = [0.001, 0.01, 0.05, 0.1, 0.25, 1 / 3, 0.4, 0.5, 0.6, 0.75, 0.8, 0.9, 0.97, 0.999, 1.0]
    for m in sizes:
        for n in sizes:
            for keep in keeps:
                found, closed = (kind.rank_for_keep(m, n, keep) for kind in (searched, layout))
                ranks = [rank for rank in (found, closed) if rank is not None]
                # A rank that costs κ m n itself falls to either side, by rounding.
                tied = any(abs(layout.parameters(m, n, r) - keep * m * n) < 1e-9 for r in ranks)
                assert found == closed or (tied and abs(ranks[0] - ranks[-1]) == 1), (m, n, keep)


@BOTH
@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3)])
def test_reference_kernel_is_the_dense_product(layout: Layout, leading: tuple[int, ...]):
    pair = random_pair(12, 20, 5)
    x, bias = torch.randn(*leading, 20, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    got = lowrank_linear(x, *layout.part(layout.encode(pair)), bias)
    torch.testing.assert_close(got, x @ pair.dense().T + bias)
