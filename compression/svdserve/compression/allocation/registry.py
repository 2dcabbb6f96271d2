"""The registry of allocators, which choose each module's rank r under one keep ratio κ.

An allocator is one decorated function of the modules and the budget. A module whose factors would
store as many parameters as its weight stays dense.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from svdserve.compression.format.layouts import Layout
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.hyperparameters import HyperParameters
from svdserve.compression.system.registry import Registry

Ranks = dict[str, int | None]
"""Rank r of every module by its name; None if the module stays dense."""
Share = Annotated[float, Field(ge=0, le=1)]
Keep = Annotated[float, Field(gt=0, le=1)]
ROUNDING = 1e-6  # parameters


@dataclass(frozen=True)
class Module:
    """The facts about a module by which an allocator chooses its rank.

    Args:
        out_features, in_features: m and n of its (stacked) weight [m, n].
        block: index of its block.
        attention: whether it belongs to an attention.
        energies: σ² of W F, descending [min(m, n)]; F Fᵀ is the Gram matrix of the teacher's
            inputs.
        curvature: mean diagonal of the Gram matrix of the gradients at its outputs.
        losses: ½σ² of Cᵀ W F, descending [min(m, n)]; C Cᵀ is the Gram matrix of those gradients.
            These are the divergences from the teacher, in nats per token, that dropping each
            component is predicted to cause.
        scores: learned scores of its components [min(m, n)], in any order.

    ``energies``, ``curvature`` and ``losses`` are None unless the allocator needs spectra;
    ``scores`` is None unless the method learns scores.
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
    """The keep ratio κ, the layout, which defines costs, and the multiple for every rank."""

    keep: float
    layout: Layout
    multiple: int = 1

    def rank(self, module: Module, keep: float) -> int | None:
        """The largest rank that stores at most ``keep`` of the dense parameters, else the least."""
        rank = self.layout.rank_for_keep(module.out_features, module.in_features, keep)
        if rank is None:
            return None
        return (rank - rank % self.multiple) or self.ranks(module)[0]

    def ranks(self, module: Module) -> list[int | None]:
        """The ranks that a module may get, by rising cost; None (dense) is last.

        For a module that is too small for any multiple, None is the only choice.
        """
        limit = min(module.out_features, module.in_features)
        ranks = range(self.multiple, limit + 1, self.multiple)
        return [*(r for r in ranks if self.cost(module, r) < module.dense), None]

    def cost(self, module: Module, rank: int | None) -> int:
        """Number of parameters that a module of this rank stores."""
        if rank is None:
            return module.dense
        return self.layout.parameters(module.out_features, module.in_features, rank)

    def share(self, modules: Mapping[str, Module], keep: float) -> Ranks:
        """Ranks with the same keep ratio for every module, which in total store at most ``keep``.

        A module whose least rank stores more than its share gets that rank, and the others share
        the rest evenly. If even the least ranks of all modules store more, these are returned.
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
        """Raise UserError, with their keep ratio, if the ranks store more than κ."""
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
    """A registered allocator, and whether it needs the modules' spectra."""

    name: str
    needs_spectra: bool
    function: Callable[..., Ranks]
    schema: HyperParameters


ALLOCATORS: Registry[Allocator] = Registry("allocator", "svdserve.allocators", Allocator)
"""All allocators by name; a package adds one by an entry point of ``svdserve.allocators``."""


def get_allocator(name: str) -> Allocator:
    """The allocator of that name.

    Raises:
        UserError: no allocator has this name; the message lists all names.
    """
    return ALLOCATORS.get_known(name)


def allocator(
    name: str, *, needs_spectra: bool = False
) -> Callable[[Callable[..., Ranks]], Callable[..., Ranks]]:
    """Register a function (modules by name, budget) → ranks as the allocator ``name``.

    Args:
        needs_spectra: whether the function reads ``energies``, ``curvature`` or ``losses``.
    """

    def register(function: Callable[..., Ranks]) -> Callable[..., Ranks]:
        schema = HyperParameters(f"allocator {name}", function)
        ALLOCATORS.add(name, Allocator(name, needs_spectra, function, schema))
        return function

    return register
