"""A compression from the recipe to the checkpoint, stage by stage.

plan → (search) → calibrate → (learn) → sweep → factor → assemble → (train) → publish. The work
directory ``OUT.partial`` keeps the results of finished stages. A resumed job continues from them
and writes the same bytes as an uninterrupted one.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from svdserve.compression.allocation import Ranks
from svdserve.compression.format.log import LOG_FILE, read_log
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.model.hub import resolve_model
from svdserve.compression.pipeline.modules import dense_bytes, parameters_with_dense
from svdserve.compression.pipeline.plan import Plan, calibrate, check_model, make_plan
from svdserve.compression.pipeline.progress import Progress
from svdserve.compression.pipeline.ranks import (
    fewest_last_blocks,
    full_ranks,
    is_searched,
    plan_ranks,
    search_last_blocks,
)
from svdserve.compression.pipeline.recipe import Recipe, Run, make_recipe
from svdserve.compression.pipeline.report import RefineReport, Report
from svdserve.compression.pipeline.stages.assembly import assemble
from svdserve.compression.pipeline.stages.factoring import Solve, by_method, factor
from svdserve.compression.pipeline.stages.learning import Learned, learn
from svdserve.compression.pipeline.stages.refine import refine
from svdserve.compression.pipeline.stages.sweep import sweep
from svdserve.compression.pipeline.workdir import WorkDirectory
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import check_output
from svdserve.compression.system.memory import peak_bytes
from svdserve.compression.system.precision import float32_products


def compress(model: str, out: Path, recipe: Recipe, run: Run | None = None) -> Report:
    """Factor a Hugging Face model and write the checkpoint to ``out``.

    Args:
        model: a directory with safetensors, or a Hub name.
        out: the checkpoint directory; one rename creates it when it is complete.
        recipe: what to compute.
        run: device, threads, resume and so on; the default uses the CPU.

    Raises:
        UserError: the input is wrong, which is found before the long part starts.
    """
    started, run = time.perf_counter(), run or Run()
    directory = resolve_model(model)
    check_output(out, [directory, *recipe.text_files])
    work = WorkDirectory.of(out, directory, recipe, run)
    plan = make_plan(directory, recipe, run)
    if is_searched(recipe):
        plan = replace(plan, recipe=search(plan, out.with_name(out.name + ".search")))
    with work.locked():
        if (facts := work.open(plan.signature)) is not None:
            return Report(work.out, **facts, made=False)
        tokens = start(plan, work)
        learned = None if plan.learner is None else choose_components(plan, work, tokens)
        final, report = closed_form(plan, work, tokens, learned)
        final, refined = train(plan, work, tokens, final)
        seconds = round(time.perf_counter() - started, 3)
        report = replace(report, seconds=seconds, peak_bytes=peak_bytes(), refinement=refined)
        work.publish(final, report.facts())
        return report


def start(plan: Plan, work: WorkDirectory, tokens: Tensor | None = None) -> Tensor:
    """Check the model unless all blocks are finished; returns the calibration tokens [N, L]."""
    if not work.finished(plan.skeleton.blocks):
        check_model(plan)
    return calibrate(plan, work, tokens)


def closed_form(
    plan: Plan,
    work: WorkDirectory,
    tokens: Tensor,
    learned: Learned | None = None,
    ranks: Ranks | None = None,
) -> tuple[Path, Report]:
    """Sweep, factor and assemble; the checkpoint in the work directory, and the report.

    Args:
        tokens: calibration tokens [N, L].
        learned: the components to keep, for a learned method.
        ranks: the rank r of every module; by default the allocator chooses them.
    """
    started = time.perf_counter()
    with Progress(work.log, plan.skeleton.blocks, plan.run.progress) as progress:
        progress.truncate(work.finished(plan.skeleton.blocks))
        progress.event("start", model=plan.base_model, **plan.signature)
        for change in work.reordered:
            progress.event("resumed_anyway", **change)
        progress.event("dense", **dense_bytes(plan.skeleton, plan.modules))
        if learned is not None:
            progress.event("scores", **asdict(learned.state))
        with float32_products(plan.recipe.precision, plan.device):
            swept = sweep(plan, tokens, work.path, progress)
            solve: Solve = by_method(plan)
            if learned is not None:
                solve, ranks = learned.solve, learned.selection.ranks
            ranks = ranks or plan_ranks(plan.modules, plan.recipe, swept.spectra)
            specs = factor(plan, ranks, solve, tokens, swept.gradients, work, progress)
        stored, dense = parameters_with_dense(plan.modules, specs)
        seconds = round(time.perf_counter() - started, 3)
        report = Report(work.out, seconds, peak_bytes(), tokens.numel(), stored, dense)
        progress.event("done", **report.facts())
    return assemble(plan, work, specs), report


def closed_form_at(
    plan: Plan, out: Path, tokens: Tensor | None = None, ranks: Ranks | None = None
) -> None:
    """Write a separate closed-form checkpoint to ``out`` for another stage, unless it exists."""
    work = WorkDirectory.of(out, plan.skeleton.directory, plan.recipe, plan.run)
    with work.locked():
        if work.open(plan.signature) is None:
            drawn = start(plan, work, tokens)
            final, report = closed_form(plan, work, drawn, ranks=ranks)
            work.publish(final, report.facts())


def search(plan: Plan, folder: Path) -> Recipe:
    """The plan's recipe with the best number of last blocks, by a quarter of its tokens.

    Args:
        folder: the folder for the checkpoint of every number that is tried.

    Raises:
        UserError: the method reads no calibration text.
    """
    recipe, run = plan.recipe, plan.run
    if not recipe.calibrated:
        raise UserError(
            f"allocator last-blocks: method {recipe.method} reads no calibration text, so blocks "
            "cannot be searched; set allocator_parameters.blocks"
        )
    fields, tokens = recipe.model_dump(), max(recipe.length, recipe.tokens // 4)
    again = run if run.force else run.model_copy(update={"resume": True})

    def error(blocks: int) -> float:
        """The error of the hidden states behind the last block, for a number of last blocks."""
        out = folder / str(blocks)
        folder.mkdir(parents=True, exist_ok=True)
        changed = {"allocator_parameters": {"blocks": blocks}, "tokens": tokens}
        tried = make_recipe(**fields | changed | {"refinement": None})
        closed_form_at(plan.of(tried, again, measures=True), out)
        return float([e["error"] for e in read_log(out / LOG_FILE) if e["event"] == "block"][-1])

    fewest = fewest_last_blocks(plan.modules, recipe)
    found = {"blocks": search_last_blocks(len(plan.modules), recipe.keep, error, fewest)}
    return make_recipe(**fields | {"allocator_parameters": found})


def choose_components(plan: Plan, work: WorkDirectory, tokens: Tensor) -> Learned:
    """Write all components of every module as a checkpoint of full rank; learn which to keep."""
    assert plan.learner is not None
    path = work.path / "components"
    run = plan.run.model_copy(update={"resume": True, "force": False})
    if not path.exists():
        stored = {"layout": "pair", "dtype": "float32", "weights": "float"}
        trained = {"refinement": None, "block_refinement": None}
        whole = plan.of(plan.recipe.model_copy(update=stored | trained), run)
        closed_form_at(whole, path, tokens, full_ranks(plan.modules))

    def allocate(scores: dict[str, Tensor]) -> Ranks:
        return plan_ranks(plan.modules, plan.recipe, scores)

    teacher, folder = plan.skeleton.directory, work.path / "scores"
    return learn(teacher, path, tokens, plan.recipe, plan.learner, allocate, run, folder)


def train(
    plan: Plan, work: WorkDirectory, tokens: Tensor, closed: Path
) -> tuple[Path, RefineReport | None]:
    """Refine the checkpoint ``closed`` if the recipe says so.

    Returns the checkpoint to publish, and the report; None if it was refined before or not at all.
    """
    settings = plan.recipe.refinement
    if settings is None or not open_checkpoint(closed).config.modules:
        return closed, None
    out = work.path / "refined"
    if out.exists():
        return out, None
    same = settings.text(plan.recipe) == plan.recipe
    run = plan.run.model_copy(update={"resume": True, "force": False})
    teacher = str(plan.skeleton.directory)
    return out, refine(teacher, closed, out, settings, run, tokens if same else None)
