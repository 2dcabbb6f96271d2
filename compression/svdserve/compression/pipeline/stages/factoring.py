"""The stage that factors the blocks one after the other, in the two-stream walk.

The work directory holds one safetensors file for each finished block. A resumed job carries the
streams over the finished blocks with their stored factors and goes on, so that its files are byte
for byte those of an uninterrupted run.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from svdserve.compression.allocation import Ranks
from svdserve.compression.format.codecs import get_codec
from svdserve.compression.format.layouts import get_layout
from svdserve.compression.format.schema import ModuleSpec
from svdserve.compression.format.stored import store
from svdserve.compression.methods import Solution, get_method
from svdserve.compression.model.architecture import Group
from svdserve.compression.pipeline.modules import ModulePlan, whole_linears
from svdserve.compression.pipeline.plan import Plan, not_finite
from svdserve.compression.pipeline.progress import Progress
from svdserve.compression.pipeline.stages.assembly import dense_in_block
from svdserve.compression.pipeline.stages.block_refinement import refine_block
from svdserve.compression.pipeline.stages.sweep import shared_folder
from svdserve.compression.pipeline.walk.student import put_back, put_factors, put_whole
from svdserve.compression.pipeline.walk.walk import BlockPass, Walk
from svdserve.compression.pipeline.workdir import WorkDirectory
from svdserve.compression.statistics.cache import TeacherStatistics
from svdserve.compression.statistics.gradients import BoundaryGradients
from svdserve.compression.statistics.linalg import relative_error
from svdserve.compression.statistics.moments import Statistics, of_teacher_alone
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.memory import peak_bytes, release

Solve = Callable[[ModulePlan, Tensor, Statistics, int], Solution]
"""Computes the factors of a module from its float64 weight [m, n], its statistics and its rank."""


def by_method(plan: Plan) -> Solve:
    """The closed form of the recipe's method."""
    method, given = get_method(plan.recipe.method), plan.recipe.parameters

    def solve(_: ModulePlan, weight: Tensor, statistics: Statistics, rank: int) -> Solution:
        return method.solve(weight, statistics, rank, given)

    return solve


@dataclass(frozen=True)
class Factoring:
    """Everything that factoring a block needs.

    Attributes:
        plan: the plan of the compression.
        ranks: the rank r of every module by its name.
        solve: computes the factors of one module.
        work: stores finished blocks.
        progress: logs modules and blocks.
        kept: cached statistics of the teacher; None without a cache.
    """

    plan: Plan
    ranks: Ranks
    solve: Solve
    work: WorkDirectory
    progress: Progress
    kept: TeacherStatistics | None = None


def factor(
    plan: Plan,
    ranks: Ranks,
    solve: Solve,
    tokens: Tensor,
    gradients: BoundaryGradients | None,
    work: WorkDirectory,
    progress: Progress,
) -> dict[str, ModuleSpec]:
    """Factor every block that is not finished; the specs of all factored modules, by name.

    Args:
        gradients: the teacher's gradients at the block boundaries, if a statistic needs them.

    Raises:
        UserError: activations or factors are not finite.
    """
    kept = None
    if plan.run.cache is not None and plan.statistics and of_teacher_alone(plan.statistics):
        folder = shared_folder(plan, tokens, work.path)
        kept = TeacherStatistics(folder, plan.skeleton, plan.statistics)
    walk = Walk(
        plan.skeleton,
        tokens,
        frozenset() if kept is not None and kept.ready else plan.statistics,
        plan.dtype,
        plan.device,
        plan.run.batch_size,
        plan.run.offload,
        gradients,
        precision=plan.recipe.precision,
        both=plan.measures,
    )
    stage = Factoring(plan, ranks, solve, work, progress, kept)
    finished = work.finished(plan.skeleton.blocks)
    specs: dict[str, ModuleSpec] = {}
    for index in range(plan.skeleton.blocks):
        if index < finished:
            specs |= _resume_block(stage, walk, index, advance=finished < plan.skeleton.blocks)
        else:
            specs |= _factor_block(stage, walk.block(index))
        progress.block(index, peak_bytes(), walk.error())
    return specs


def _factor_block(stage: Factoring, block: BlockPass) -> dict[str, ModuleSpec]:
    plan, progress, index = stage.plan, stage.progress, block.index
    specs: dict[str, ModuleSpec] = {}
    tensors: dict[str, Tensor] = {}
    for group in block.groups:
        progress.group(index, group.path)
        begun = time.perf_counter()
        statistics = _collect(stage, block, group)
        release()
        collected = time.perf_counter()
        for module in plan.modules[index]:
            if module.group != group:
                continue
            spec, facts = _solve(stage, block, module, statistics.of_rows(module.rows), tensors)
            if spec is not None:
                specs[module.name] = spec
            progress.solved(index, module.name, **facts, pass_seconds=round(collected - begun, 4))
        del statistics  # free the memory before the next group's statistics
        release()
    tensors |= _finish_block(stage, block, specs)
    whole = whole_linears([plan.modules[index]], plan.recipe, specs)
    encoded = [name for name, spec in whole.items() if not get_codec(spec.codec).plain]
    tensors |= dense_in_block(plan.skeleton, index, plan.recipe, specs, encoded)
    stage.work.save_block(index, tensors, specs)
    return specs


def _collect(stage: Factoring, block: BlockPass, group: Group) -> Statistics:
    plan, kept = stage.plan, stage.kept
    if kept is not None and kept.ready:
        return kept.read(block.index, group, plan.device)
    try:
        statistics = block.statistics(group)
    except FloatingPointError as error:
        name = f"{plan.skeleton.block_name(block.index)}.{group.path}"
        raise not_finite(f"{name}: {error}", plan.dtype) from None
    if kept is not None:
        kept.write(block.index, group, statistics)
    return statistics


def _solve(
    stage: Factoring,
    block: BlockPass,
    module: ModulePlan,
    statistics: Statistics,
    tensors: dict[str, Tensor],
) -> tuple[ModuleSpec | None, dict[str, Any]]:
    """Factor one module, and add it to the student and to the tensors of the block.

    Returns its spec, or None if it stays dense, and facts for the log.
    """
    plan, rank = stage.plan, stage.ranks[module.name]
    storage = plan.storage[module.name]
    gram = statistics.gram if statistics.gram is not None else statistics.teacher_gram
    weight = torch.cat([block.weight(module.group, m) for m in module.members]).double()
    if not bool(weight.isfinite().all()):
        raise not_finite(f"{module.name}: not finite", plan.dtype)
    if rank is None:
        error = 0.0
        if not storage.codec.plain:
            rounded = put_whole(block, module, storage, tensors, gram)
            error = relative_error(weight, rounded, gram)
        return None, {"rank": None, "error": error, "beta": None}
    begun = time.perf_counter()
    solution = stage.solve(module, weight, statistics, rank)
    try:
        layout = get_layout(plan.recipe.layout)
        factors = store(solution.factors, layout, storage.codec, storage.dtype, gram)
    except FloatingPointError as fault:
        narrow = storage.dtype == torch.float16
        help_ = "give --dtype bfloat16 or float32" if narrow else "its weights are too large"
        raise UserError(f"{module.name}: {fault}; {help_}") from None
    seconds = round(time.perf_counter() - begun, 4)
    spec = put_factors(block, module, factors, tensors)
    error = relative_error(weight, factors.dense(torch.float64), gram)
    facts = {"rank": factors.rank, "error": error, "beta": None, **solution.facts}
    return spec, {**facts, "solve_seconds": seconds}


def _resume_block(
    stage: Factoring, walk: Walk, index: int, *, advance: bool
) -> dict[str, ModuleSpec]:
    """Load a finished block and carry the streams over it with its stored factors.

    If ``advance`` is False, no later block needs the streams, and they stay where they are.
    """
    plan = stage.plan
    stored, specs = stage.work.load_block(index)
    if not walk.runs or not advance:
        return specs
    block = walk.block(index)
    whole = whole_linears([plan.modules[index]], plan.recipe, specs)
    put_back(block, plan.modules[index], specs, whole, stored)
    block.finish(refined=plan.recipe.block_refinement is not None and bool(specs))
    return specs


def _finish_block(
    stage: Factoring, block: BlockPass, specs: Mapping[str, ModuleSpec]
) -> dict[str, Tensor]:
    """Refine a block if the recipe says so, and finish it; the tensors that refinement changed."""
    plan, settings = stage.plan, stage.plan.recipe.block_refinement
    if settings is None or not specs:
        block.finish()
        return {}
    begun, prefix = time.perf_counter(), f"{plan.skeleton.block_name(block.index)}."
    best, state = refine_block(
        block,
        settings,
        {
            f"{name}.{matrix}".removeprefix(prefix): plan.storage[name]
            for name, spec in specs.items()
            for matrix in get_layout(spec.layout).matrices
        },
        lambda step, _: stage.progress.group(block.index, f"refinement, step {step}"),
    )
    block.finish(refined=True)
    release()
    seconds = time.perf_counter() - begun
    stage.progress.refined(block.index, **asdict(state), seconds=seconds)
    return {f"{prefix}{name}": tensor for name, tensor in best.items()}
