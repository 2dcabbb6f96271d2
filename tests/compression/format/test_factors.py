"""Layouts: interpolative equals pair, stores r² parameters fewer, and ranks respect the budget."""

import pytest
import torch
from svdserve.compression.format.factors import interpolative, parameters, rank_for_keep

from svdserve.compression.format.layouts import LAYOUTS, Factors
from svdserve.kernels import lowrank_linear
from svdserve.kernels.parts import other_channels

SHAPES = [(12, 20, 5), (20, 12, 11), (7, 7, 7), (9, 30, 1), (30, 9, 9)]


def random_pair(m: int, n: int, r: int, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(m * n + r)
    return Factors(
        factor_in=torch.randn(r, n, generator=generator, dtype=dtype),
        factor_out=torch.randn(m, r, generator=generator, dtype=dtype),
    )


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)]
)
def test_interpolative_equals_pair(m: int, n: int, r: int, dtype: torch.dtype, tolerance: float):
    pair = random_pair(m, n, r)
    want = pair.factor_out @ pair.factor_in
    got = interpolative(pair).to(dtype).dense().double()
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_interpolative_stores_r_squared_fewer(m: int, n: int, r: int):
    pair = random_pair(m, n, r)
    inter = interpolative(pair)
    stored = [f.factor_in.numel() + f.factor_out.numel() for f in (pair, inter)]
    assert stored[0] - stored[1] == r * r
    assert stored == [parameters(layout, m, n, r) for layout in LAYOUTS]
    assert inter.pivots is not None
    assert inter.pivots.dtype == torch.int32
    assert len(set(inter.pivots.tolist())) == r


def test_pivot_columns_are_stored_exactly():
    pair = random_pair(12, 20, 5)
    inter = interpolative(pair)
    assert inter.pivots is not None
    torch.testing.assert_close(inter.factor_out, pair.dense()[:, inter.pivots.long()])


def test_dependent_rows_lower_the_rank_without_loss():
    pair = random_pair(12, 20, 4)
    repeated = Factors(
        factor_in=torch.cat([pair.factor_in, pair.factor_in[:2]]),
        factor_out=torch.cat([pair.factor_out, pair.factor_out[:, 1:3]], dim=1),
    )
    inter = interpolative(repeated)
    assert inter.rank == 4
    torch.testing.assert_close(inter.dense(), repeated.dense())


def test_other_channels_are_the_complement_in_order():
    assert other_channels(torch.tensor([4, 1]), 6).tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n"), [(576, 576), (960, 576), (576, 1536), (192, 576), (3, 5)])
@pytest.mark.parametrize("keep", [0.1, 0.4, 0.8, 0.97])
def test_rank_is_the_largest_within_the_budget(layout, m: int, n: int, keep: float):
    rank = rank_for_keep(layout, m, n, keep)
    assert rank is not None
    assert rank == 1 or parameters(layout, m, n, rank) <= keep * m * n
    full = rank == min(m, n)
    assert full or parameters(layout, m, n, rank + 1) > keep * m * n


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_as_large_as_the_weight_stay_dense(layout):
    assert rank_for_keep(layout, 64, 64, 1.0) is None
    # A single row costs more as two factors than as itself.
    assert rank_for_keep("pair", 1, 8, 0.99) is None


def test_published_rank_of_a_square_matrix():
    """design.md: 0.553 d instead of 0.4 d at κ = 0.8."""
    assert rank_for_keep("pair", 1000, 1000, 0.8) == 400
    assert rank_for_keep("interpolative", 1000, 1000, 0.8) == 552


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3)])
def test_reference_kernel_is_the_dense_product(layout, leading: tuple[int, ...]):
    factors = random_pair(12, 20, 5)
    if layout == "interpolative":
        factors = interpolative(factors)
    x, bias = torch.randn(*leading, 20, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    got = lowrank_linear(x, factors.factor_in, factors.factor_out, factors.pivots, bias)
    torch.testing.assert_close(got, x @ factors.dense().T + bias)
