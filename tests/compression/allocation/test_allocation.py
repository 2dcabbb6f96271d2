"""Allocators against exhaustive search, and their budgets."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from svdserve.compression.allocation import ALLOCATORS, Budget, Module, get_allocator
from svdserve.compression.allocation.divergence import divergence
from svdserve.compression.allocation.last_blocks import last_blocks
from svdserve.compression.allocation.scores import scores
from svdserve.compression.allocation.uniform import uniform
from svdserve.compression.format.layouts import INTERPOLATIVE, PAIR, get_layout
from svdserve.compression.system.errors import UserError

SHAPES = [(12, 16), (16, 12), (30, 10), (8, 20)]


def module(index: int, m: int, n: int, strength: float = 1.0) -> Module:
    generator = torch.Generator().manual_seed(index)
    falling = torch.logspace(0, -0.2 - index, min(m, n), dtype=torch.float64)
    spectrum = strength * falling * torch.rand(min(m, n), generator=generator).double()
    spectrum = spectrum.sort(descending=True).values
    return Module(m, n, index // 2, index % 2 == 0, spectrum, 1.0 + index, spectrum, spectrum)


def spent(modules: dict[str, Module], ranks: dict[str, int | None], budget: Budget) -> int:
    return sum(budget.cost(modules[name], rank) for name, rank in ranks.items())


def tail(modules: dict[str, Module], ranks: dict[str, int | None]) -> float:
    return sum(
        0.0 if rank is None else float(modules[name].losses[rank:].sum())
        for name, rank in ranks.items()
    )


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_divergence_is_nearly_what_exhaustive_search_finds(layout: str, keep: float):
    modules = {f"m{i}": module(i, *shape, 10.0**-i) for i, shape in enumerate(SHAPES[:3])}
    budget = Budget(keep, get_layout(layout))
    allowed = keep * sum(m.dense for m in modules.values())
    best = min(
        tail(modules, ranks)
        for chosen in product(*(budget.ranks(m) for m in modules.values()))
        if spent(modules, ranks := dict(zip(modules, chosen, strict=True)), budget) <= allowed
    )
    ours = divergence(modules, budget, floor=0.0)
    assert spent(modules, ours, budget) <= allowed
    assert tail(modules, ours) <= 1.1 * best + 1e-12
    assert tail(modules, ours) < tail(modules, uniform(modules, budget))


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@pytest.mark.parametrize("layout", ["pair", "interpolative"])
@pytest.mark.parametrize("keep", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("multiple", [1, 4])
def test_budget_is_kept_and_used_up_to_one_rank(name: str, layout: str, keep: float, multiple: int):
    shapes = {f"m{i}": (64 + 16 * (i % 3), 48 + 16 * (i % 2)) for i in range(12)}
    modules = {n: module(i, *shape) for i, (n, shape) in enumerate(shapes.items())}
    budget = Budget(keep, get_layout(layout), multiple)
    parameters = {"blocks": 5} if name == "last-blocks" else {}
    ranks = get_allocator(name).function(modules, budget, **parameters)
    assert ranks.keys() == modules.keys()
    assert all(rank is None or rank % multiple == 0 for rank in ranks.values())
    allowed = keep * sum(m.dense for m in modules.values())
    left = allowed - spent(modules, ranks, budget)
    assert left >= 0
    step = multiple * max(m.out_features + m.in_features for m in modules.values())
    # Module by module at a fixed κ each may fall short by one rank; a shared budget by one in all.
    assert left < step * (len(modules) if name in ("uniform", "last-blocks") else 1)


def test_uniform_is_the_keep_ratio_of_every_module():
    modules = {f"m{i}": module(i, *shape) for i, shape in enumerate(SHAPES)}
    for layout in (PAIR, INTERPOLATIVE):
        got = uniform(modules, Budget(0.7, layout))
        expected = {n: layout.rank_for_keep(*s, 0.7) for n, s in zip(modules, SHAPES, strict=True)}
        assert got == expected


def test_attention_keep_gives_the_rest_to_the_mlp():
    modules = {f"m{i}": module(i, 512, 512) for i in range(4)}  # even ones are attention
    budget = Budget(0.8, PAIR)
    ranks = uniform(modules, budget, attention_keep=0.9)
    assert ranks["m0"] == ranks["m2"] == PAIR.rank_for_keep(512, 512, 0.9)
    assert ranks["m1"] == ranks["m3"] == PAIR.rank_for_keep(512, 512, 0.7)
    with pytest.raises(UserError, match=r"attention_keep is 0.5.*the MLP would keep 1.10"):
        uniform(modules, budget, attention_keep=0.5)


def test_last_blocks_leaves_the_first_ones_dense():
    modules = {f"m{i}": module(i, 256, 256) for i in range(8)}  # four blocks
    ranks = last_blocks(modules, Budget(0.8, PAIR), blocks=1)
    assert [ranks[f"m{i}"] for i in range(6)] == [None] * 6
    assert ranks["m6"] == ranks["m7"] == PAIR.rank_for_keep(256, 256, 0.2)
    with pytest.raises(UserError, match="give more blocks"):
        last_blocks(modules, Budget(0.6, PAIR), blocks=1)


def test_floor_keeps_a_share_of_the_uniform_parameters():
    modules = {f"m{i}": module(i, 128, 128, 1e-6 if i else 1.0) for i in range(4)}
    budget = Budget(0.6, INTERPOLATIVE)
    starved = divergence(modules, budget, floor=0.0)
    fed = divergence(modules, budget, floor=0.7)
    least = INTERPOLATIVE.rank_for_keep(128, 128, 0.7 * 0.6)
    assert min(starved[f"m{i}"] or 0 for i in range(1, 4)) < least
    assert all(rank is None or rank >= least for rank in fed.values())


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
def test_scores_are_taken_from_the_greatest_on(layout: str):
    """One component after the other, in plain Python; the sizes are equal, so that it fits."""
    modules = {f"m{i}": module(i, 40, 24) for i in range(4)}
    for index, entry in enumerate(modules.values()):  # any order
        entry.scores[:] = entry.scores[torch.randperm(24)] * (1 + index)
    budget = Budget(0.6, get_layout(layout))
    ranks = dict.fromkeys(modules, 1)
    waiting = sorted((-s, n) for n, m in modules.items() for s in m.scores.sort().values[:-1])
    for _, name in waiting:
        more = ranks | {name: ranks[name] + 1}
        if spent(modules, more, budget) > 0.6 * sum(m.dense for m in modules.values()):
            break
        ranks = more
    got = scores(modules, budget)
    assert sum(abs(got[name] - rank) for name, rank in ranks.items()) <= 1


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
def test_equal_scores_use_the_budget_up(layout: str):
    modules = {f"m{i}": replace(module(i, 40, 24), scores=torch.full((24,), 0.1)) for i in range(4)}
    budget = Budget(0.7, get_layout(layout))
    left = 0.7 * sum(m.dense for m in modules.values()) - spent(
        modules, scores(modules, budget), budget
    )
    assert 0 <= left < 64


SMALL = [(48, 48), (512, 128), (128, 512), (16, 128), (128, 128), (1, 40)]


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        (name, floor)
        for name, entry in sorted(ALLOCATORS.items())
        for floor in ((0.0, 0.5, 1.0) if entry.needs_spectra else (0.0,))
    ],
)
@pytest.mark.parametrize("layout", ["pair", "interpolative"])
@pytest.mark.parametrize("multiple", [1, 24, 64])
@pytest.mark.parametrize("keep", [0.005, 0.05, 0.3, 0.6, 0.9])
def test_the_budget_holds_or_is_refused(
    name: str, layout: str, multiple: int, keep: float, floor: float
):
    """Refused exactly where the least of all choices is more, found by listing them."""
    modules = {f"m{i}": module(i, *shape) for i, shape in enumerate(SMALL)}
    budget = Budget(keep, get_layout(layout), multiple)
    parameters = {"floor": floor} if ALLOCATORS[name].needs_spectra else {}
    parameters |= {"blocks": 3} if name == "last-blocks" else {}
    dense = sum(m.dense for m in modules.values())
    least = sum(
        min(
            [m.dense]
            + [
                budget.cost(m, rank)
                for rank in range(multiple, min(m.out_features, m.in_features) + 1, multiple)
            ]
        )
        for m in modules.values()
    )
    ranks = ALLOCATORS[name].function(modules, budget, **parameters)
    assert all(rank is None or rank % multiple == 0 for rank in ranks.values())
    if least <= keep * dense:
        budget.check(modules, ranks)
        assert spent(modules, ranks, budget) <= keep * dense
    else:
        with pytest.raises(
            UserError, match=rf"^keep is {keep}: the least ranks.* or more$"
        ) as told:
            budget.check(modules, ranks)
        possible = float(str(told.value).split(" or more")[0].rsplit(" ", 1)[1])
        again = Budget(possible, get_layout(layout), multiple)
        again.check(modules, ALLOCATORS[name].function(modules, again, **parameters))


def test_attention_that_cannot_give_is_refused():
    modules = {f"m{i}": module(i, 64, 64) for i in range(4)}
    budget = Budget(0.5, PAIR, 16)
    ranks = uniform(modules, budget, attention_keep=0.1)
    with pytest.raises(UserError, match="other allocator parameters, or a keep ratio"):
        Budget(0.45, PAIR, 16).check(modules, ranks)


def test_unknown_names_and_values_are_refused():
    with pytest.raises(UserError, match="unknown allocator 'best'; allowed: divergence, energy"):
        get_allocator("best")
    with pytest.raises(UserError, match="floor is 2"):
        get_allocator("energy").schema.check({"floor": 2})
