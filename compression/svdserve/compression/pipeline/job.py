"""The compression job: checks, resumes, drives the walk and writes the checkpoint. No mathematics.

The work directory ``OUT.partial`` holds one safetensors file per finished block. A resumed job
carries the streams over the finished blocks with their stored factors and goes on, so that its
files are byte for byte those of an uninterrupted run.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdserve.compression.allocation.registry import Ranks, get_allocator
from svdserve.compression.format.checkpoint import LOG_FILE, check_finite_tensors
from svdserve.compression.format.factors import interpolative, stored
from svdserve.compression.format.schema import ModuleSpec
from svdserve.compression.methods import get_method
from svdserve.compression.methods.learned.driver import Learned, learn
from svdserve.compression.methods.learned.learner import Learner
from svdserve.compression.model.architecture import Group
from svdserve.compression.model.containers import require_walkable
from svdserve.compression.model.hub import model_name, resolve_model
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.assembly import Assembly
from svdserve.compression.pipeline.block_refinement import refine_block
from svdserve.compression.pipeline.calibration.tokens import (
    calibration_digests,
    calibration_tokens,
    check_calibration,
)
from svdserve.compression.pipeline.plan import (
    Unit,
    check_reachable,
    dense_bytes,
    fewest_last_blocks,
    int8_linears,
    not_finite,
    parameters_with_dense,
    ranks_of,
    search_last_blocks,
    stored_dtypes,
    swept,
    units_of,
)
from svdserve.compression.pipeline.progress import Progress, bar, read_log
from svdserve.compression.pipeline.recipe import Recipe, Refinement, Run, make_recipe
from svdserve.compression.pipeline.refine import refine
from svdserve.compression.pipeline.report import RefineReport, Report
from svdserve.compression.pipeline.student import put_factors, put_int8, replay
from svdserve.compression.pipeline.walk import BlockPass, Walk
from svdserve.compression.pipeline.workdir import WorkDirectory, summation
from svdserve.compression.statistics.cache import TeacherStatistics, cache_folder, sweeping
from svdserve.compression.statistics.gradients import BoundaryGradients
from svdserve.compression.statistics.linalg import relative_error
from svdserve.compression.statistics.moments import (
    Statistics,
    needing_gradients,
    of_teacher_alone,
    without_gradients,
)
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import check_folder, check_output
from svdserve.compression.system.machine import float32_products, usable_device
from svdserve.compression.system.memory import bound_kernel_cache, peak_bytes, release


def compress(model: str, out: Path, recipe: Recipe, run: Run | None = None) -> Report:
    """Factor a Hugging Face model and write the checkpoint to ``out``.

    Args:
        model: a directory with safetensors, or a Hub name.
        out: the checkpoint directory; it appears when it is complete, in one rename.
        recipe: what to compute.
        run: how; defaults to the CPU.

    Raises:
        UserError: anything wrong with the input, found before the long part starts.
    """
    run = run or Run()
    directory = resolve_model(model)
    check_output(out, [directory, *recipe.text_files])
    if recipe.allocator == "last-blocks" and recipe.allocator_parameters["blocks"] is None:
        recipe = _with_last_blocks(str(directory), out.with_name(out.name + ".search"), recipe, run)
    return Job(str(directory), out, recipe, run).execute()


def _with_last_blocks(model: str, work: Path, recipe: Recipe, run: Run) -> Recipe:
    """The recipe with its number of blocks searched, on a quarter of the calibration tokens."""
    if not recipe.calibrated:
        raise UserError(
            f"allocator last-blocks: method {recipe.method} reads no calibration text to measure "
            "the final block on; set allocator_parameters.blocks"
        )
    fields, tokens = recipe.model_dump(), max(recipe.length, recipe.tokens // 4)
    again = run if run.force else run.model_copy(update={"resume": True})

    def error(blocks: int) -> float:
        out = work / str(blocks)
        work.mkdir(parents=True, exist_ok=True)
        changed = {"allocator_parameters": {"blocks": blocks}, "tokens": tokens}
        Job(model, out, make_recipe(**fields | changed), again, both=True).execute()
        return float([e["error"] for e in read_log(out / LOG_FILE) if e["event"] == "block"][-1])

    skeleton = Skeleton(resolve_model(model))
    total, fewest = skeleton.blocks, fewest_last_blocks(skeleton, recipe)
    found = {"blocks": search_last_blocks(total, recipe.keep, error, fewest)}
    return make_recipe(**fields | {"allocator_parameters": found})


class Job:
    """One compression with its work directory. ``execute`` runs or resumes it.

    Args:
        ranks: given, with the ``tokens``, where the closed form of a learned method is wanted.
        both: measure the error behind every block, whatever the method needs.
    """

    learned: Learned | None = None
    kept: TeacherStatistics | None = None

    def __init__(
        self,
        model: str,
        out: Path,
        recipe: Recipe,
        run: Run,
        ranks: Ranks | None = None,
        tokens: Tensor | None = None,
        *,
        both: bool = False,
    ) -> None:
        bound_kernel_cache()
        self.both = both or recipe.block_refinement is not None
        self.recipe, self.run = recipe, run
        directory = resolve_model(model)
        self.work = WorkDirectory(
            out,
            resume=run.resume,
            force=run.force,
            inputs=[directory, *recipe.text_files],
            resume_anyway=run.resume_anyway,
        )
        self.method = get_method(recipe.method)
        self.skeleton = Skeleton(directory)
        for folder in filter(None, (run.offload, run.cache)):
            check_folder(folder)
        self.base_model = model_name(directory)
        self.allocator = get_allocator(recipe.allocator)
        self.tokens, self.learner = tokens, None
        self.statistics = self.method.needs(recipe.parameters)
        learner = self.method.make_learner(recipe.parameters)
        if ranks is None and learner is not None and recipe.keep < 1:
            learner.training(recipe.seed).check_sequences(recipe.sequences)
            self.learner, self.statistics = learner, frozenset()
        compared = self.allocator.needs_spectra
        if recipe.keep == 1:  # every linear stays dense: gradients would say nothing
            self.statistics, compared = without_gradients(self.statistics), False
        self.uses_gradients = bool(needing_gradients(self.statistics)) or compared
        if recipe.calibrated:
            check_calibration(self.skeleton.directory, recipe)
        for settings, text in recipe.trainings:
            check_calibration(self.skeleton.directory, text)
            settings.check_sequences(text.sequences)
        self.device = usable_device(run.device)
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        self.dtype = self.skeleton.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        self.assembly = Assembly(self.skeleton, self.work, recipe, self.base_model)
        self.assembly.check_cast()
        self.units = units_of(self.skeleton, recipe.grouping)
        self.dtypes = stored_dtypes(self.skeleton, self.units, recipe)
        if ranks is None:
            check_reachable(self.units, recipe)
        planned_later = compared or self.learner is not None
        self.ranks = ranks or ({} if planned_later else ranks_of(self.units, recipe, {}))
        self.signature = {
            "recipe": recipe.model_dump(mode="json"),
            "weights": {"model": self.skeleton.files.fingerprint},
            "texts": calibration_digests([recipe, *(text for _, text in recipe.trainings)]),
            "order": summation(self.device, run.batch_size),
        }

    def execute(self) -> Report:
        with self.work.locked():
            return self._execute()

    def _execute(self) -> Report:
        started = time.perf_counter()
        if (facts := self.work.open(self.signature)) is not None:
            return Report(self.work.out, **facts, made=False)
        finished = self.work.finished(self.skeleton.blocks)
        if not finished:
            self._check_model()
        tokens = self._tokens()
        if self.learner is not None:
            self._learn(self.learner)
        with Progress(self.work.log, self.skeleton.blocks, self.run.progress) as progress:
            progress.truncate(finished)
            progress.event("start", model=self.base_model, **self.signature)
            for change in self.work.reordered:
                progress.event("resumed_anyway", **change)
            progress.event("dense", **dense_bytes(self.skeleton, self.units))
            if self.learned is not None:
                progress.event("scores", **asdict(self.learned.state))
            with float32_products(self.recipe.precision, self.device):
                gradients = self._sweep(tokens, progress) if self.uses_gradients else None
                specs = self._walk(tokens, gradients, finished, progress)
            stored, dense = parameters_with_dense(self.units, specs)
            seconds = round(time.perf_counter() - started, 3)
            report = Report(self.work.out, seconds, peak_bytes(), tokens.numel(), stored, dense)
            progress.event("done", **report.facts())
        linears = int8_linears(self.units, self.recipe, specs)
        final = self.assembly.assemble(specs, linears)
        if self.recipe.refinement is not None and specs:
            final, refined = self._refine(final, tokens, self.recipe.refinement)
            seconds = round(time.perf_counter() - started, 3)
            report = replace(report, seconds=seconds, peak_bytes=peak_bytes(), refinement=refined)
        self.work.publish(final, report.facts())
        return report

    def _check_model(self) -> None:
        """Look through the weights, and try the blocks on two tokens, before the long part."""
        files = self.skeleton.files
        with bar(self.run.progress) as shown:
            total = sum(info.nbytes for info in files.info.values())
            task = shown.add_task("checking the weights", total=total, facts="")
            check_finite_tensors(files, lambda done: shown.update(task, completed=done))
        if self.recipe.calibrated:
            require_walkable(self.skeleton, self.device)

    def _refine(
        self, closed_form: Path, tokens: Tensor, settings: Refinement
    ) -> tuple[Path, RefineReport | None]:
        """The refined checkpoint, in the work directory; no report if it was there already."""
        out = self.work.path / "refined"
        if out.exists():
            return out, None
        same = settings.text(self.recipe) == self.recipe
        run = self.run.model_copy(update={"resume": True, "force": False})
        teacher = str(self.skeleton.directory)
        return out, refine(teacher, closed_form, out, settings, run, tokens if same else None)

    # Planning

    def _sweep(self, tokens: Tensor, progress: Progress) -> BoundaryGradients:
        """Gradients at the block boundaries and, where the allocator asks, the ranks."""
        folder = self._shared(tokens)
        with sweeping(folder):
            gradients, spectra = swept(
                self.skeleton,
                self.units,
                self.recipe,
                tokens,
                folder,
                self.device,
                progress.gradients,
            )
        if self.allocator.needs_spectra:
            self.ranks = ranks_of(self.units, self.recipe, spectra)
        return gradients

    def _shared(self, tokens: Tensor) -> Path:
        """Where files go that do not depend on the student: the cache or the work directory."""
        if self.run.cache is None:
            return self.work.path
        settings = {
            "order": self.signature["order"],
            "dtype": str(self.dtype),
            "precision": self.recipe.precision,
            "gradients": self.recipe.gradient_rows(len(tokens)),
            "seed": self.recipe.seed,
        }
        return cache_folder(self.run.cache, self.skeleton, tokens, settings)

    def _learn(self, learner: Learner) -> None:
        """All components of every unit, as a checkpoint of full rank; then which of them stay."""
        path, tokens = self.work.path / "components", self._tokens()
        run = self.run.model_copy(update={"resume": True, "force": False})
        if not path.exists():
            stored = {"layout": "pair", "dtype": "float32", "weights": "float"}
            whole = self.recipe.model_copy(update=stored)
            units = [unit for block in self.units for unit in block]
            full: Ranks = {u.name: min(u.rows.stop - u.rows.start, u.columns) for u in units}
            Job(str(self.skeleton.directory), path, whole, run, full, tokens).execute()
        teacher, folder = self.skeleton.directory, self.work.path / "scores"

        def allocate(scores: dict[str, Tensor]) -> Ranks:
            return ranks_of(self.units, self.recipe, scores)

        self.learned = learn(teacher, path, tokens, self.recipe, learner, allocate, run, folder)
        self.ranks = self.learned.selection.ranks

    # Blocks

    def _walk(
        self,
        tokens: Tensor,
        gradients: BoundaryGradients | None,
        finished: int,
        progress: Progress,
    ) -> dict[str, ModuleSpec]:
        """Factor every block that is not finished; the specs of all."""
        specs: dict[str, ModuleSpec] = {}
        if self.run.cache is not None and self.statistics and of_teacher_alone(self.statistics):
            self.kept = TeacherStatistics(self._shared(tokens), self.skeleton, self.statistics)
        passes = self.kept is None or not self.kept.ready
        walk = Walk(
            self.skeleton,
            tokens,
            self.statistics if passes else frozenset(),
            self.dtype,
            self.device,
            self.run.batch_size,
            self.run.offload,
            gradients,
            precision=self.recipe.precision,
            both=self.both,
        )
        for index in range(self.skeleton.blocks):
            if index < finished:
                specs |= self._replay(walk, index, advance=finished < self.skeleton.blocks)
            else:
                specs |= self._factor(walk, index, progress)
            progress.block(index, peak_bytes(), walk.error())
        return specs

    def _factor(self, walk: Walk, index: int, progress: Progress) -> dict[str, ModuleSpec]:
        block = walk.block(index)
        specs: dict[str, ModuleSpec] = {}
        tensors: dict[str, Tensor] = {}
        for group in block.groups:
            progress.group(index, group.path)
            begun = time.perf_counter()
            statistics = self._collect(block, group)
            release()
            collected = time.perf_counter()
            for unit in self.units[index]:
                if unit.group != group:
                    continue
                spec, facts = self._solve(block, unit, statistics.of_rows(unit.rows), tensors)
                if spec is not None:
                    specs[unit.name] = spec
                progress.solved(index, unit.name, **facts, pass_seconds=round(collected - begun, 4))
            del statistics  # not beside those of the next group
            release()
        tensors |= self._finish(block, specs, tensors, progress)
        linears = int8_linears([self.units[index]], self.recipe, specs)
        tensors |= self.assembly.dense_in_block(index, specs, linears)
        self.work.save_block(index, tensors, specs)
        return specs

    def _collect(self, block: BlockPass, group: Group) -> Statistics:
        if self.kept is not None and self.kept.ready:
            return self.kept.read(block.index, group, self.device)
        try:
            statistics = block.statistics(group)
        except FloatingPointError as error:
            name = f"{self.skeleton.block_name(block.index)}.{group.path}"
            raise not_finite(f"{name}: {error}", self.dtype) from None
        if self.kept is not None:
            self.kept.write(block.index, group, statistics)
        return statistics

    def _solve(
        self, block: BlockPass, unit: Unit, statistics: Statistics, tensors: dict[str, Tensor]
    ) -> tuple[ModuleSpec | None, dict[str, Any]]:
        """Factor one unit, put it into the student and among the tensors of the block."""
        rank = self.ranks[unit.name]
        int8 = self.recipe.weights == "int8"
        gram = statistics.gram if statistics.gram is not None else statistics.teacher_gram
        weight = torch.cat([block.weight(unit.group, m) for m in unit.members]).double()
        if not bool(weight.isfinite().all()):
            raise not_finite(f"{unit.name}: not finite", self.dtype)
        if rank is None:
            error = relative_error(weight, put_int8(block, unit, tensors), gram) if int8 else 0.0
            return None, {"rank": None, "error": error, "beta": None}
        begun = time.perf_counter()
        if self.learned is not None:
            solution = self.learned.solve(unit.name)
        else:
            solution = self.method.solve(weight, statistics, rank, self.recipe.parameters)
        factors = solution.factors
        if self.recipe.layout == "interpolative":
            factors = interpolative(factors)
        seconds = round(time.perf_counter() - begun, 4)
        try:
            factors = stored(factors, self.dtypes[unit.name], self.recipe.weights)
        except FloatingPointError as fault:
            narrow = self.dtypes[unit.name] == torch.float16
            help_ = "give --dtype bfloat16 or float32" if narrow else "its weights are too large"
            raise UserError(f"{unit.name}: {fault}; {help_}") from None
        spec = put_factors(block, unit, factors, tensors)
        error = relative_error(weight, factors.to(torch.float64).dense(), gram)
        facts = {"rank": factors.rank, "error": error, "beta": None, **solution.facts}
        return spec, {**facts, "solve_seconds": seconds}

    def _replay(self, walk: Walk, index: int, *, advance: bool) -> dict[str, ModuleSpec]:
        """Carry the streams over a finished block with the factors that it stored.

        Not where ``advance`` is off: no block is left that would need them.
        """
        stored, specs = self.work.load_block(index)
        if not walk.runs or not advance:
            return specs
        block = walk.block(index)
        replay(block, self.units[index], specs, stored)
        block.finish(refined=self.recipe.block_refinement is not None and bool(specs))
        return specs

    def _finish(
        self,
        block: BlockPass,
        specs: dict[str, ModuleSpec],
        tensors: Mapping[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        """Refine a block where the recipe says so, and finish it; the tensors that changed."""
        settings = self.recipe.block_refinement
        if settings is None or not specs:
            block.finish()
            return {}
        begun, prefix = time.perf_counter(), f"{self.skeleton.block_name(block.index)}."
        best, state = refine_block(
            block,
            settings,
            {name.removeprefix(prefix): tensor.dtype for name, tensor in tensors.items()},
            lambda step, _: progress.group(block.index, f"refinement, step {step}"),
        )
        block.finish(refined=True)
        release()
        progress.refined(block.index, **asdict(state), seconds=time.perf_counter() - begun)
        return {f"{prefix}{name}": tensor for name, tensor in best.items()}

    # Files

    def _drawn(self) -> Tensor:
        source, shown = self.skeleton.directory, self.run.progress
        return calibration_tokens(source, self.recipe, self.device, progress=shown)

    def _tokens(self) -> Tensor:
        if not self.recipe.calibrated:
            return torch.empty(0, self.recipe.length, dtype=torch.int64)
        given = self.tokens
        draw = self._drawn if given is None else lambda: given
        tokens = self.work.tokens(draw)
        for settings, text in self.recipe.trainings:
            if text == self.recipe:
                settings.check_sequences(len(tokens))  # a short text has fewer than asked
        return tokens
