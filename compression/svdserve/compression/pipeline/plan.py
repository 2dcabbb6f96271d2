"""What will be factored, and to which ranks."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdserve.compression.allocation.registry import Budget, Module, Ranks, get_allocator
from svdserve.compression.format.checkpoint import FACTOR_DTYPES
from svdserve.compression.format.schema import ModuleSpec
from svdserve.compression.model.architecture import Group
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.recipe import Grouping, Recipe, make_recipe
from svdserve.compression.pipeline.workdir import parameters_of
from svdserve.compression.statistics.gradients import BoundaryGradients, stacked_weights
from svdserve.compression.statistics.spectra import Spectra
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.memory import release

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


def stored_dtypes(
    skeleton: Skeleton, units: list[list[Unit]], recipe: Recipe
) -> dict[str, torch.dtype]:
    """The dtype of every unit's factors: the recipe's, or the one that holds all of its linears.

    Raises:
        UserError: a linear is no floating-point tensor, or of a dtype that a checkpoint cannot
            hold where the recipe names no other.
    """
    found: dict[str, torch.dtype] = {}
    for unit in (unit for block in units for unit in block):
        dtypes = [skeleton.files.info[f"{linear}.weight"].dtype for linear in unit.linears]
        for linear, dtype in zip(unit.linears, dtypes, strict=True):
            named = str(dtype).removeprefix("torch.")
            if not dtype.is_floating_point:
                raise UserError(
                    f"{linear}.weight is {named}, which is no floating-point weight; give the "
                    "original model"
                )
            if recipe.dtype == "auto" and dtype not in FACTOR_DTYPES and not recipe.keeps_all:
                raise UserError(
                    f"{linear}.weight is {named}, which factors cannot be stored in; give --dtype "
                    "float32, bfloat16 or float16"
                )
        own = reduce(torch.promote_types, dtypes) if recipe.dtype == "auto" else None
        found[unit.name] = own or getattr(torch, recipe.dtype)
    return found


def ranks_of(units: list[list[Unit]], recipe: Recipe, spectra: dict[str, Tensor]) -> Ranks:
    """The rank of every unit by its name; ``spectra`` as Spectra.read returns them, or empty.

    It may also have ``<module>.scores``, where a method has learned them.
    """
    if recipe.keep == 1:  # nothing to save: every linear stays dense
        return {unit.name: None for block in units for unit in block}
    modules = _modules(units, spectra)
    budget = Budget(recipe.keep, recipe.layout, recipe.rank_multiple)
    allocator = get_allocator(recipe.allocator)
    ranks = allocator.function(modules, budget, **recipe.allocator_parameters)
    budget.check(modules, ranks)
    return ranks


def check_reachable(units: list[list[Unit]], recipe: Recipe) -> None:
    """Refuse a keep ratio below what the least ranks of all units store; UserError says which.

    Known before spectra are: an allocator spends no less.
    """
    modules = _modules(units, {})
    budget = Budget(recipe.keep, recipe.layout, recipe.rank_multiple)
    budget.check(modules, {name: budget.ranks(module)[0] for name, module in modules.items()})


def _modules(units: list[list[Unit]], spectra: dict[str, Tensor]) -> dict[str, Module]:
    modules: dict[str, Module] = {}
    for index, block in enumerate(units):
        for unit in block:
            curvature = spectra.get(f"{unit.name}.curvature")
            modules[unit.name] = Module(
                out_features=unit.rows.stop - unit.rows.start,
                in_features=unit.columns,
                block=index,
                attention=unit.group.attends,
                energies=spectra.get(f"{unit.name}.energies"),
                curvature=None if curvature is None else float(curvature),
                losses=spectra.get(f"{unit.name}.losses"),
                scores=spectra.get(f"{unit.name}.scores"),
            )
    return modules


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
    """The gradients at the block boundaries and the spectra, if the recipe's allocator needs them.

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
    spectra = None
    if get_allocator(recipe.allocator).needs_spectra:
        modules = [
            {g.path: [(u.name, u.rows) for u in block if u.group == g] for g in groups}
            for groups, block in zip(skeleton.groups, units, strict=True)
        ]
        spectra = Spectra(folder / recipe.grouping, modules)

    def done(index: int, block: nn.Module) -> None:
        begun = time.perf_counter()
        if spectra is not None:
            spectra.finish(index, stacked_weights(block, skeleton.groups[index]))
        notify(index, time.perf_counter() - begun)
        release()

    if not (gradients.complete and (spectra is None or spectra.complete)):
        watch = None if spectra is None else spectra.watch
        try:
            gradients.sweep(skeleton, tokens, device, recipe.seed, watch, done)
        except FloatingPointError as error:
            raise not_finite(str(error), gradients.dtype) from None
    return gradients, {} if spectra is None else spectra.read()


def not_finite(message: str, dtype: torch.dtype) -> UserError:
    """What a FloatingPointError of a pass over the tokens comes from, and what helps.

    The weights are finite: the job looked through them before it began.

    Args:
        message: where it was noticed.
        dtype: that hidden states are kept in.
    """
    if dtype == torch.float16:
        return UserError(f"{message}; they overflow float16: give --dtype bfloat16 or float32")
    return UserError(
        f"{message}; no weight holds inf or nan, so that activations or their squares overflow "
        "float32: the model cannot be calibrated on this text"
    )


def fewest_last_blocks(skeleton: Skeleton, recipe: Recipe) -> int:
    """How many of the last blocks can hold κ with their least ranks; all where none can."""
    units, fields = units_of(skeleton, recipe.grouping), recipe.model_dump()
    for blocks in range(1, skeleton.blocks):
        with suppress(UserError):
            changed = {"allocator_parameters": {"blocks": blocks}}
            ranks_of(units, make_recipe(**fields | changed), {})
            return blocks
    return skeleton.blocks


def dense_bytes(skeleton: Skeleton, units: list[list[Unit]]) -> dict[str, Any]:
    """Bytes of the dense model's tensors, and of each linear that a unit stands for."""
    info = skeleton.files.info
    linears = [linear for block in units for unit in block for linear in unit.linears]
    return {
        "nbytes": sum(tensor.nbytes for tensor in info.values()),
        "linears": {linear: info[f"{linear}.weight"].nbytes for linear in linears},
    }


def search_last_blocks(
    blocks: int, keep: float, error: Callable[[int], float], possible: int = 1
) -> int:
    """How many of the last blocks to factor: the number of least error at the final block.

    ResSVD (arXiv 2505.20112), algorithm 3, over six numbers from the fewest that keep 15 % of
    themselves up to all.

    Args:
        blocks: of the model.
        keep: κ of the whole model.
        error: of the final block's output, for a number of last blocks.
        possible: the fewest whose least ranks are within κ.
    """
    fewest = min(blocks, max(possible, int(blocks * (1 - keep) / 0.85) + 1))
    steps = (round(i * (blocks - fewest) / (_CANDIDATES - 1)) for i in range(_CANDIDATES))
    return min(sorted({fewest + step for step in steps}), key=error)
