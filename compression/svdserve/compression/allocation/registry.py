"""Which rank each factored module gets, under one keep ratio κ.

An allocator is one decorated function of the modules and the budget, as a method is. A module whose
factors would store as much as its weight stays dense.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from svdserve.compression.format.layouts import Layout
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.hyperparameters import Parameters
from svdserve.compression.system.registry import Registry

Ranks = dict[str, int | None]
"""Rank of every module by its name; None where it stays dense."""
Share = Annotated[float, Field(ge=0, le=1)]
Keep = Annotated[float, Field(gt=0, le=1)]
ROUNDING = 1e-6  # parameters


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
        rank = self.layout.rank_for_keep(module.out_features, module.in_features, keep)
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
        return self.layout.parameters(module.out_features, module.in_features, rank)

    def share(self, modules: Mapping[str, Module], keep: float) -> Ranks:
        """The same ``keep`` for every module, and no more than that for all of them together.

        Where the least choice of a module is more than its share, the others give: what it leaves
        is shared evenly among them. The ranks are the least ones where even those store more.
        """
        fixed: Ranks = {}
        total = keep * sum(module.dense for module in modules.values()) + ROUNDING
        while True:
            open_ = {name: module for name, module in modules.items() if name not in fixed}
            left = total - sum(self.cost(modules[name], rank) for name, rank in fixed.items())
            dense = sum(module.dense for module in open_.values())
            share = min(keep, left / dense) if fixed and dense else keep
            ranks = {name: self.rank(module, max(share, 0.0)) for name, module in open_.items()}
            over = {
                name: rank
                for name, rank in ranks.items()
                if self.cost(modules[name], rank) > share * modules[name].dense + ROUNDING
            }
            if not over:
                return {name: (fixed | ranks)[name] for name in modules}
            fixed |= {name: self.ranks(modules[name])[0] for name in over}

    def check(self, modules: Mapping[str, Module], ranks: Ranks) -> None:
        """Refuse ranks that store more than κ; UserError says what they keep."""
        dense = sum(module.dense for module in modules.values())
        stored = sum(self.cost(modules[name], rank) for name, rank in ranks.items())
        if stored > self.keep * dense + ROUNDING:
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


ALLOCATORS: Registry[Allocator] = Registry("allocator", "svdserve.allocators", Allocator)
"""By name; an installed package adds one by the entry point ``svdserve.allocators``."""


def get_allocator(name: str) -> Allocator:
    """The allocator of that name.

    Raises:
        UserError: there is none; lists those that there are.
    """
    return ALLOCATORS.get_known(name)


def allocator(
    name: str, *, needs_spectra: bool = False
) -> Callable[[Callable[..., Ranks]], Callable[..., Ranks]]:
    """Register a function (modules by name, budget) → ranks as the allocator ``name``."""

    def register(function: Callable[..., Ranks]) -> Callable[..., Ranks]:
        schema = Parameters(f"allocator {name}", function)
        ALLOCATORS.add(name, Allocator(name, needs_spectra, function, schema))
        return function

    return register
