"""Only the last blocks of a model are factored (ResSVD, arXiv 2505.20112)."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from svdserve.compression.allocation.registry import Budget, Module, Ranks, allocator
from svdserve.compression.system.errors import UserError


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
        blocks: how many; a search replaces None by a number before this function is called.

    Raises:
        UserError: the last ``blocks`` blocks hold too few parameters to reach κ.
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
