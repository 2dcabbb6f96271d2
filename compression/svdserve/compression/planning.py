"""What will be factored, and to which ranks."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from svdserve.compression.allocation import Budget, Module, Ranks, get_allocator
from svdserve.compression.errors import UserError
from svdserve.compression.gradients import BoundaryGradients, stacked_weights
from svdserve.compression.memory import release
from svdserve.compression.profile import Profile
from svdserve.compression.recipe import Grouping, Recipe
from svdserve.compression.schema import GROUPS, ModuleSpec
from svdserve.compression.skeleton import Group, Skeleton
from svdserve.compression.workdir import parameters_of

_CANDIDATES = 6


@dataclass(frozen=True)
class Unit:
    """One factored module to be: its group, its name in the model, and its linears.

    ``rows`` are theirs in the group's stacked weight [m, n]; ``columns`` is n.
    """

    group: Group
    name: str
    members: tuple[str, ...]
    rows: slice
    columns: int

    @property
    def linears(self) -> list[str]:
        """Full names of the members."""
        return [f"{self.name.rpartition('.')[0]}.{member}" for member in self.members]


def units_of(skeleton: Skeleton, grouping: Grouping) -> list[list[Unit]]:
    """The units of every block, in the order of its groups."""
    return [_units_of_block(skeleton, index, grouping) for index in range(skeleton.blocks)]


def _units_of_block(skeleton: Skeleton, index: int, grouping: Grouping) -> list[Unit]:
    prefix = skeleton.block_name(index)
    units: list[Unit] = []
    for group in skeleton.groups[index]:
        parent = skeleton.layers[index].get_submodule(group.parent)
        shapes = [parent.get_submodule(m).get_parameter("weight").shape for m in group.members]
        columns = shapes[0][1]
        if grouping == "shared":
            rows = slice(0, sum(shape[0] for shape in shapes))
            units.append(Unit(group, f"{prefix}.{group.path}", group.members, rows, columns))
            continue
        start = 0
        for member, shape in zip(group.members, shapes, strict=True):
            name, rows = f"{prefix}.{group.parent}.{member}", slice(start, start + shape[0])
            units.append(Unit(group, name, (member,), rows, columns))
            start = rows.stop
    return units


def ranks_of(units: list[list[Unit]], recipe: Recipe, profile: dict[str, Tensor]) -> Ranks:
    """The rank of every unit by its name; ``profile`` as Profile.read returns it, or empty.

    It may also have ``<module>.scores``, where a method has learned them.
    """
    if recipe.keep == 1:  # nothing to save: every linear stays dense
        return {unit.name: None for block in units for unit in block}
    modules: dict[str, Module] = {}
    for index, block in enumerate(units):
        for unit in block:
            curvature = profile.get(f"{unit.name}.curvature")
            modules[unit.name] = Module(
                out_features=unit.rows.stop - unit.rows.start,
                in_features=unit.columns,
                block=index,
                attention=unit.group.name in ("qkv_proj", "o_proj"),
                energies=profile.get(f"{unit.name}.energies"),
                curvature=None if curvature is None else float(curvature),
                losses=profile.get(f"{unit.name}.losses"),
                scores=profile.get(f"{unit.name}.scores"),
            )
    budget = Budget(recipe.keep, recipe.layout, recipe.rank_multiple)
    allocator = get_allocator(recipe.allocator)
    return allocator.function(modules, budget, **recipe.allocator_parameters)


def parameters_with_dense(units: list[list[Unit]], specs: dict[str, ModuleSpec]) -> tuple[int, int]:
    """Stored and dense parameters of all units, those that stay dense among them."""
    stored, dense = parameters_of(specs)
    left = [unit for block in units for unit in block if unit.name not in specs]
    kept = sum((unit.rows.stop - unit.rows.start) * unit.columns for unit in left)
    return stored + kept, dense + kept


def int8_linears(
    units: list[list[Unit]], recipe: Recipe, specs: dict[str, ModuleSpec]
) -> list[str]:
    """Full names of the linears that stay dense and are stored in int8."""
    if recipe.weights == "float":
        return []
    left = (unit for block in units for unit in block if unit.name not in specs)
    return [linear for unit in left for linear in unit.linears]


def swept(
    skeleton: Skeleton,
    units: list[list[Unit]],
    recipe: Recipe,
    tokens: Tensor,
    folder: Path,
    device: torch.device,
    notify: Callable[[int, float], None],
) -> tuple[BoundaryGradients, dict[str, Tensor]]:
    """The gradients at the block boundaries and the profile, if the recipe's allocator has one.

    Args:
        skeleton: the teacher.
        units: of all blocks.
        recipe: what to compute.
        tokens: [N, L].
        folder: keeps both; what is there is not computed again.
        device: where blocks run.
        notify: told the index of every block that is done, and the seconds its spectra took.

    Raises:
        UserError: hidden states or gradients are not finite.
    """
    gradients = BoundaryGradients(folder, recipe.gradient_rows(len(tokens)))
    profile = None
    if get_allocator(recipe.allocator).profile:
        groups = [
            {name: [(u.name, u.rows) for u in block if u.group.name == name] for name in GROUPS}
            for block in units
        ]
        profile = Profile(folder / recipe.grouping, groups)

    def done(index: int, block: nn.Module) -> None:
        begun = time.perf_counter()
        if profile is not None:
            profile.finish(index, stacked_weights(block, skeleton.groups[index]))
        notify(index, time.perf_counter() - begun)
        release()

    if not (gradients.complete and (profile is None or profile.complete)):
        watch = None if profile is None else profile.watch
        try:
            gradients.sweep(skeleton, tokens, device, recipe.seed, watch, done)
        except FloatingPointError as error:
            raise UserError(f"{error}; use another dtype") from None
    return gradients, {} if profile is None else profile.read()


def search_last_blocks(blocks: int, keep: float, error: Callable[[int], float]) -> int:
    """How many of the last blocks to factor: the number of least error at the final block.

    ResSVD (arXiv 2505.20112), algorithm 3, over six numbers from the fewest that keep 15 % of
    themselves up to all.

    Args:
        blocks: of the model.
        keep: κ of the whole model.
        error: of the final block's output, for a number of last blocks.
    """
    fewest = min(blocks, int(blocks * (1 - keep) / 0.85) + 1)
    steps = (round(i * (blocks - fewest) / (_CANDIDATES - 1)) for i in range(_CANDIDATES))
    return min(sorted({fewest + step for step in steps}), key=error)
