"""The rank r of every module under the budget of the recipe's keep ratio."""

from collections.abc import Callable, Mapping
from contextlib import suppress

from torch import Tensor

from svdserve.compression.allocation import Budget, Module, Ranks, get_allocator
from svdserve.compression.format.layouts import get_layout
from svdserve.compression.pipeline.modules import Modules, every
from svdserve.compression.pipeline.recipe import Recipe, make_recipe
from svdserve.compression.system.errors import UserError

_CANDIDATES = 6


def plan_ranks(modules: Modules, recipe: Recipe, known: Mapping[str, Tensor]) -> Ranks:
    """The rank r of every module by its name.

    Args:
        known: ``<module>.energies``, ``.curvature`` and ``.losses`` if the allocator needs spectra,
            ``<module>.scores`` if the method learns scores, else empty.

    Raises:
        UserError: the ranks store more than κ.
    """
    if recipe.keep == 1:  # nothing to save, so every linear stays dense
        return {module.name: None for module in every(modules)}
    sizes = _sizes(modules, known)
    budget = _budget(recipe)
    allocator = get_allocator(recipe.allocator)
    ranks = allocator.function(sizes, budget, **recipe.allocator_parameters)
    budget.check(sizes, ranks)
    return ranks


def is_searched(recipe: Recipe) -> bool:
    """Whether the number of last blocks to factor must be searched."""
    return recipe.allocator == "last-blocks" and recipe.allocator_parameters["blocks"] is None


def full_ranks(modules: Modules) -> Ranks:
    """The ranks that keep every component of every module."""
    return {m.name: min(m.out_features, m.in_features) for m in every(modules)}


def check_reachable(modules: Modules, recipe: Recipe) -> None:
    """Raise UserError if the least ranks of all modules store more than the keep ratio.

    No allocator can store less, so this check needs no spectra.
    """
    sizes, budget = _sizes(modules, {}), _budget(recipe)
    budget.check(sizes, {name: budget.ranks(module)[0] for name, module in sizes.items()})


def _budget(recipe: Recipe) -> Budget:
    return Budget(recipe.keep, get_layout(recipe.layout), recipe.rank_multiple)


def _sizes(modules: Modules, known: Mapping[str, Tensor]) -> dict[str, Module]:
    found: dict[str, Module] = {}
    for index, block in enumerate(modules):
        for module in block:
            curvature = known.get(f"{module.name}.curvature")
            found[module.name] = Module(
                out_features=module.out_features,
                in_features=module.in_features,
                block=index,
                attention=module.group.attends,
                energies=known.get(f"{module.name}.energies"),
                curvature=None if curvature is None else float(curvature),
                losses=known.get(f"{module.name}.losses"),
                scores=known.get(f"{module.name}.scores"),
            )
    return found


def fewest_last_blocks(modules: Modules, recipe: Recipe) -> int:
    """The least number of last blocks whose least ranks stay within κ; all blocks if none does."""
    fields = recipe.model_dump()
    for blocks in range(1, len(modules)):
        with suppress(UserError):
            changed = {"allocator_parameters": {"blocks": blocks}}
            plan_ranks(modules, make_recipe(**fields | changed), {})
            return blocks
    return len(modules)


def search_last_blocks(
    blocks: int, keep: float, error: Callable[[int], float], possible: int = 1
) -> int:
    """The number of last blocks to factor that gives the least error behind the final block.

    This is algorithm 3 of ResSVD (arXiv 2505.20112). It tries six numbers, from the least number
    whose blocks keep at least 15 % of their parameters, up to all blocks.

    Args:
        blocks: the number of blocks of the model.
        keep: κ of the whole model.
        error: gives the error behind the final block for a number of last blocks.
        possible: the least number of last blocks whose least ranks stay within κ.
    """
    fewest = min(blocks, max(possible, int(blocks * (1 - keep) / 0.85) + 1))
    steps = (round(i * (blocks - fewest) / (_CANDIDATES - 1)) for i in range(_CANDIDATES))
    return min(sorted({fewest + step for step in steps}), key=error)
