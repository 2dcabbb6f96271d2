"""The same keep ratio for every module."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from svdserve.compression.allocation.registry import Budget, Module, Ranks, allocator
from svdserve.compression.system.errors import UserError

Keep = Annotated[float, Field(gt=0, le=1)]


@allocator("uniform", needs_spectra=False)
def uniform(
    modules: Mapping[str, Module], budget: Budget, *, attention_keep: Keep | None = None
) -> Ranks:
    """The same keep ratio for every module, or one for attention and another for the MLP.

    Args:
        modules, budget: as for all allocators.
        attention_keep: keep ratio of attention; the MLP gets the rest of the budget.

    Raises:
        UserError: the rest is no keep ratio above 0 and at most 1.
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
