"""An allocator: the second half of the blocks keeps less, the first half what that leaves."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from svdserve.compression.allocation.registry import Budget, Module, Ranks, allocator


@allocator("example-deeper")
def deeper(
    modules: Mapping[str, Module],
    budget: Budget,
    *,
    less: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> Ranks:
    """κ (1 - less) for the second half of the blocks."""
    middle = (1 + max(module.block for module in modules.values())) / 2
    late = {name: module for name, module in modules.items() if module.block >= middle}
    early = {name: module for name, module in modules.items() if module.block < middle}
    found = budget.share(late, budget.keep * (1 - less))
    spent = sum(budget.cost(modules[name], rank) for name, rank in found.items())
    whole = sum(module.dense for module in modules.values())
    left = (budget.keep * whole - spent) / sum(module.dense for module in early.values())
    return budget.share(early, min(1.0, left)) | found
