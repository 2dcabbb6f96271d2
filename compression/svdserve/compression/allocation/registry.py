"""Which rank each factored module gets, under one keep ratio κ.

An allocator is one decorated function, as a method is. ``energy``, ``sensitivity`` and
``divergence`` minimise the sum over modules of a tail Σ_{i>r} of a spectrum under one budget of
parameters, and differ in the spectrum only. A module whose factors would store as much as its
weight stays dense.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from svdserve.compression.format.factors import Layout, parameters, rank_for_keep
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.hyperparameters import Parameters

Ranks = dict[str, int | None]
"""Rank of every module by its name; None where it stays dense."""
Share = Annotated[float, Field(ge=0, le=1)]
Keep = Annotated[float, Field(gt=0, le=1)]
_ROUNDING = 1e-6  # parameters


@dataclass(frozen=True)
class Module:
    """What an allocator knows of a factored module.

    Args:
        out_features, in_features: m and n of its (stacked) weight.
        block: index of its block.
        attention: whether it is part of the attention.
        energies: σ² of W F, descending [min(m, n)], F Fᵀ the teacher's Gram matrix.
        curvature: mean diagonal of the gradient Gram matrix of its outputs.
        losses: ½σ² of Cᵀ W F, descending, C Cᵀ the gradient Gram matrix: the divergence from the
            teacher, in nats per token, that dropping each component is predicted to cause.
        scores: learned importance of each component [min(m, n)], of any order.

    The next to last three are None unless the allocator asks for spectra, and the last unless the
    method learns.
    """

    out_features: int
    in_features: int
    block: int
    attention: bool
    energies: Tensor | None = None
    curvature: float | None = None
    losses: Tensor | None = None
    scores: Tensor | None = None

    @property
    def dense(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Budget:
    """κ, what a rank costs, and the multiple that every rank must be of."""

    keep: float
    layout: Layout
    multiple: int = 1

    def rank(self, module: Module, keep: float) -> int | None:
        """The largest rank within ``keep`` of the module's dense parameters, or the least one."""
        rank = rank_for_keep(self.layout, module.out_features, module.in_features, keep)
        if rank is None:
            return None
        return (rank - rank % self.multiple) or self.ranks(module)[0]

    def ranks(self, module: Module) -> list[int | None]:
        """What a module may get, by rising cost; None (dense) is last.

        A module that is too small for any multiple has no other choice.
        """
        limit = min(module.out_features, module.in_features)
        ranks = range(self.multiple, limit + 1, self.multiple)
        return [*(r for r in ranks if self.cost(module, r) < module.dense), None]

    def cost(self, module: Module, rank: int | None) -> int:
        """Stored parameters."""
        if rank is None:
            return module.dense
        return parameters(self.layout, module.out_features, module.in_features, rank)

    def share(self, modules: Mapping[str, Module], keep: float) -> Ranks:
        """The same ``keep`` for every module, and no more than that for all of them together.

        Where the least choice of a module is more than its share, the others give: what it leaves
        is shared evenly among them. The ranks are the least ones where even those store more.
        """
        fixed: Ranks = {}
        total = keep * sum(module.dense for module in modules.values()) + _ROUNDING
        while True:
            open_ = {name: module for name, module in modules.items() if name not in fixed}
            left = total - sum(self.cost(modules[name], rank) for name, rank in fixed.items())
            dense = sum(module.dense for module in open_.values())
            share = min(keep, left / dense) if fixed and dense else keep
            ranks = {name: self.rank(module, max(share, 0.0)) for name, module in open_.items()}
            over = {
                name: rank
                for name, rank in ranks.items()
                if self.cost(modules[name], rank) > share * modules[name].dense + _ROUNDING
            }
            if not over:
                return {name: (fixed | ranks)[name] for name in modules}
            fixed |= {name: self.ranks(modules[name])[0] for name in over}

    def check(self, modules: Mapping[str, Module], ranks: Ranks) -> None:
        """Refuse ranks that store more than κ; UserError says what they keep."""
        dense = sum(module.dense for module in modules.values())
        stored = sum(self.cost(modules[name], rank) for name, rank in ranks.items())
        if stored > self.keep * dense + _ROUNDING:
            least = math.ceil(stored / dense * 1e4) / 1e4
            each = f", each a multiple of {self.multiple}," if self.multiple > 1 else ""
            smaller = "a smaller rank multiple, " if self.multiple > 1 else ""
            raise UserError(
                f"keep is {self.keep}: the least ranks{each} keep {least:.4f} of the parameters; "
                f"give {smaller}other allocator parameters, or a keep ratio of {least:.4f} or more"
            )


@dataclass(frozen=True)
class Allocator:
    """A registered allocator and whether it needs the modules' spectra."""

    name: str
    needs_spectra: bool
    function: Callable[..., Ranks]
    schema: Parameters


ALLOCATORS: dict[str, Allocator] = {}


def get_allocator(name: str) -> Allocator:
    """Look an allocator up; UserError lists the known ones."""
    if name not in ALLOCATORS:
        raise UserError(f"unknown allocator {name!r}; allowed: {', '.join(sorted(ALLOCATORS))}")
    return ALLOCATORS[name]


def allocator(
    name: str, *, needs_spectra: bool
) -> Callable[[Callable[..., Ranks]], Callable[..., Ranks]]:
    """Register a function (modules by name, budget) → ranks as the allocator ``name``."""

    def register(function: Callable[..., Ranks]) -> Callable[..., Ranks]:
        schema = Parameters(f"allocator {name}", function)
        ALLOCATORS[name] = Allocator(name, needs_spectra, function, schema)
        return function

    return register


@allocator("uniform", needs_spectra=False)
def uniform(
    modules: Mapping[str, Module], budget: Budget, *, attention_keep: Keep | None = None
) -> Ranks:
    """The same κ for every module, or one for attention and the one that is left for the MLP.

    Raises:
        UserError: ``attention_keep`` leaves nothing for the MLP, or more than all of it.
    """
    if attention_keep is None:
        return budget.share(modules, budget.keep)
    attention = sum(m.dense for m in modules.values() if m.attention)
    rest = sum(m.dense for m in modules.values()) - attention
    mlp_keep = (budget.keep * (attention + rest) - attention_keep * attention) / rest
    if not 0 < mlp_keep <= 1:
        raise UserError(
            f"attention_keep is {attention_keep}: with a keep ratio of {budget.keep} the MLP would "
            f"keep {mlp_keep:.2f} of its parameters; allowed: more than 0, at most 1"
        )
    ranks = dict.fromkeys(modules)
    for attends, keep in ((True, attention_keep), (False, mlp_keep)):
        side = {name: module for name, module in modules.items() if module.attention == attends}
        ranks |= budget.share(side, keep)
    return ranks


@allocator("last-blocks", needs_spectra=False)
def last_blocks(
    modules: Mapping[str, Module],
    budget: Budget,
    *,
    blocks: Annotated[int, Field(ge=1)] | None = None,
) -> Ranks:
    """Partial-layer compression (ResSVD, arXiv 2505.20112): only the last blocks are factored.

    Args:
        modules, budget: as for all allocators.
        blocks: how many; None is replaced by a searched number before this is called.

    Raises:
        UserError: so few blocks that even nothing left of them would not reach κ.
    """
    assert blocks is not None
    total = 1 + max(module.block for module in modules.values())
    dense = sum(module.dense for module in modules.values())
    removed = (1 - budget.keep) * dense
    last = {n: m for n, m in modules.items() if m.block >= total - blocks}
    keep = 1 - removed / sum(module.dense for module in last.values())
    if keep <= 0:
        raise UserError(
            f"blocks is {blocks}: the last {blocks} of {total} blocks cannot bring the model to a "
            f"keep ratio of {budget.keep}; give more blocks"
        )
    return dict.fromkeys(modules) | budget.share(last, keep)


@allocator("energy", needs_spectra=True)
def energy(modules: Mapping[str, Module], budget: Budget, *, floor: Share = 0.5) -> Ranks:
    """Least sum of relative whitened tail energies ‖(W − Ŵ)F‖² / ‖WF‖².

    Args:
        modules, budget: as for all allocators.
        floor: share of its uniform parameters that every module keeps. Without one, loss-driven
            ranks starve modules and hurt (Swift-SVD, arXiv 2604.01609, table 3).
    """
    spectra = {
        n: e / total if (total := e.sum()) > 0 else e  # a weight of zeros has nothing to lose
        for n, m in modules.items()
        if (e := m.energies) is not None
    }
    return _least_tail(modules, spectra, budget, floor)


@allocator("sensitivity", needs_spectra=True)
def sensitivity(modules: Mapping[str, Module], budget: Budget, *, floor: Share = 0.5) -> Ranks:
    """Least sum of whitened tail energies times the mean curvature at the module's outputs."""
    spectra = {
        n: e * c
        for n, m in modules.items()
        if (e := m.energies) is not None and (c := m.curvature) is not None
    }
    return _least_tail(modules, spectra, budget, floor)


@allocator("divergence", needs_spectra=True)
def divergence(modules: Mapping[str, Module], budget: Budget, *, floor: Share = 0.5) -> Ranks:
    """Least divergence from the teacher as the two-sided (Kronecker-factored) metric predicts."""
    spectra = {n: loss for n, m in modules.items() if (loss := m.losses) is not None}
    return _least_tail(modules, spectra, budget, floor)


@allocator("scores", needs_spectra=False)
def scores(modules: Mapping[str, Module], budget: Budget) -> Ranks:
    """The learned order: components of the whole model by falling score until κ is spent.

    A step that no longer fits is passed over, so that less than one rank of any module is left.
    """
    if budget.keep >= 1:
        return dict.fromkeys(modules)
    ranks = {name: budget.ranks(module) for name, module in modules.items()}
    room = budget.keep * sum(module.dense for module in modules.values()) + _ROUNDING
    room -= sum(budget.cost(module, ranks[name][0]) for name, module in modules.items())
    steps: list[tuple[float, str, int]] = []
    for name, module in modules.items():
        assert module.scores is not None, "the method must have learned them"
        falling = module.scores.double().sort(descending=True).values
        ends = [len(falling) if rank is None else rank for rank in ranks[name]]
        totals = falling.cumsum(0)[torch.tensor(ends) - 1]
        # Rounding must not put a step of equal scores before the one that it follows.
        means = (totals.diff() / torch.tensor(ends).diff()).cummin(0).values
        steps += [(-mean, name, i) for i, mean in enumerate(means.tolist())]
    taken = dict.fromkeys(modules, 0)
    for _, name, step in sorted(steps):
        extra = budget.cost(modules[name], ranks[name][step + 1])
        extra -= budget.cost(modules[name], ranks[name][step])
        if step == taken[name] and extra <= room:
            taken[name] += 1
            room -= extra
    return {name: ranks[name][step] for name, step in taken.items()}


class _Choice:
    """What one module may get: its costs and the tails that they leave, both by rising cost."""

    def __init__(self, module: Module, spectrum: Tensor, budget: Budget, floor: float) -> None:
        least = budget.rank(module, floor * budget.keep)
        options = budget.ranks(module)
        self.ranks = options[options.index(least) :]
        self.costs = torch.tensor([budget.cost(module, r) for r in self.ranks]).double()
        tails = spectrum.double().flip(0).cumsum(0).flip(0)  # tails[r] = Σ_{i>r}
        left = [0.0 if r is None or r >= len(tails) else float(tails[r]) for r in self.ranks]
        self.tails = torch.tensor(left, dtype=torch.float64)
        self.chosen = 0

    def at_price(self, price: float) -> int:
        """Index of the least tail + price · cost; the cheaper one where two are equal."""
        return int((self.tails + price * self.costs).argmin())

    def cost(self) -> float:
        return float(self.costs[self.chosen])

    def gain(self, room: float) -> tuple[float, int]:
        """The best tail saved per parameter by a step up that costs at most ``room``."""
        extra = self.costs[self.chosen + 1 :] - self.costs[self.chosen]
        extra = extra[extra <= room]
        if not len(extra):
            return 0.0, self.chosen
        saved = self.tails[self.chosen] - self.tails[self.chosen + 1 :][: len(extra)]
        best = int((saved / extra).argmax())
        return float(saved[best] / extra[best]), self.chosen + 1 + best


def _least_tail(
    modules: Mapping[str, Module], spectra: Mapping[str, Tensor], budget: Budget, floor: float
) -> Ranks:
    """Ranks of least total tail whose parameters sum to at most κ, and to κ within one rank.

    A price for a parameter, found by bisection, makes the modules' choices independent (Lagrangian
    relaxation); what that leaves of the budget goes to the steps that save most per parameter.
    """
    total = budget.keep * sum(module.dense for module in modules.values()) + _ROUNDING
    choices = {n: _Choice(m, spectra[n], budget, floor) for n, m in modules.items()}
    if floor and sum(float(choice.costs[0]) for choice in choices.values()) > total:
        # Rounded up to whole ranks the floors are more than the budget: only that can be held.
        return _least_tail(modules, spectra, budget, 0.0)

    def spent(price: float) -> float:
        for choice in choices.values():
            choice.chosen = choice.at_price(price)
        return sum(choice.cost() for choice in choices.values())

    low, high = 0.0, 1.0
    while spent(high) > total and high < 1e300:
        high *= 1e3
    for _ in range(200):
        middle = (low * high) ** 0.5 if low > 0 else high / 1e3
        low, high = (low, middle) if spent(middle) <= total else (middle, high)
    room = total - spent(high)
    while room > 0:
        best = max(choices.values(), key=lambda choice: choice.gain(room)[0])
        gain, step = best.gain(room)
        if gain <= 0:
            break
        room += best.cost()
        best.chosen = step
        room -= best.cost()
    return {name: choice.ranks[choice.chosen] for name, choice in choices.items()}
