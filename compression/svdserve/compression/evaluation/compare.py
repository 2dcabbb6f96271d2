"""`svdserve compare`: a grid of recipes and keep ratios, compared with the dense model.

The working folder holds one checkpoint for each cell and a record of every finished evaluation, so
that a killed comparison goes on where it stopped. A record is valid only for the same texts,
options and recipe.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from svdserve.compression.evaluation.options import Evaluation
from svdserve.compression.evaluation.perplexity import Perplexity, perplexity
from svdserve.compression.evaluation.plots import new_figure, save_figure
from svdserve.compression.evaluation.tasks import TaskAccuracies, check_tasks, task_accuracies
from svdserve.compression.format.integrity import file_sha256
from svdserve.compression.format.tensors import TensorFiles
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.model.hub import model_name, resolve_model
from svdserve.compression.pipeline.calibration.tokens import calibration_digests
from svdserve.compression.pipeline.card import add_results
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Recipe, Run
from svdserve.compression.system.errors import UserError, explain
from svdserve.compression.system.files import (
    check_folder,
    check_output,
    exclusive,
    remove_temporaries,
    write_json,
)
from svdserve.compression.system.machine import usable_device

DENSE = "dense"
_BROKEN = 10_000  # perplexity


class Cell(BaseModel):
    """One model of the comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    keep: float
    recipe: Recipe | None
    stored_bytes: int
    """Bytes of all weights in the files."""
    perplexities: tuple[Perplexity, ...]
    scores: TaskAccuracies | None

    def excess(self, dense: "Cell", text: int) -> float:
        """ln(perplexity) minus ln(perplexity) of the dense model, on the text of this index."""
        return self.perplexities[text].mean_loss - dense.perplexities[text].mean_loss

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy over the tasks (tasks.py); None without tasks."""
        return None if self.scores is None else self.scores.accuracy


class Comparison(BaseModel):
    """All cells; the first one is the dense model."""

    model: str
    inputs: dict[str, str] = {}
    """Digests of the model and of the calibration files."""
    cells: list[Cell]

    def portable(self) -> dict[str, Any]:
        """JSON for a results file, in which files and folders have names instead of paths."""
        named: dict[str, Any] = _by_name(self.model_dump(mode="json"))
        return named


def compare(
    model: str,
    work: Path,
    recipes: Mapping[str, Recipe],
    keeps: Sequence[float],
    evaluation: Evaluation,
    run: Run | None = None,
) -> Comparison:
    """Compress with every recipe at every keep ratio, and evaluate all models in the same way.

    The card of every checkpoint gets its results and those of the dense model.

    Args:
        model: a directory or a Hub name.
        work: the working folder; finished checkpoints and records in it are used again.
        recipes: the recipes by their names in the tables; ``keeps`` replaces their keep ratios. A
            recipe that would store the dense model unchanged gets no row.
        keeps: the keep ratios κ.
        evaluation: texts and tasks.
        run: how this machine compresses. Without a cache of its own it gets one in ``work``, and
            it always resumes.

    Raises:
        UserError: there is nothing to measure, a task cannot be used, or ``work`` holds another
            recipe under the same name, or results of another model or calibration text.
    """
    if not evaluation.texts and not evaluation.tasks:
        raise UserError("nothing to compare on; give a text, a task, or both")
    check_tasks(evaluation.tasks, evaluation.limit)
    directory = resolve_model(model)
    usable_device(evaluation.device)
    texts = {text for recipe in recipes.values() for text in recipe.text_files}
    outputs = {checkpoint_of(work, name, keep) for name in recipes for keep in keeps}
    for out in outputs:
        check_output(out, [directory, *evaluation.files, *texts])
    run = run or Run()
    # All cells have the same teacher, so its statistics are worth keeping.
    run = run.model_copy(update={"cache": run.cache or work / "teacher", "resume": True})
    check_folder(work)
    with exclusive(work / "compare"):
        for folder in (work, *outputs):
            remove_temporaries(folder)
        return _compare(directory, work, recipes, keeps, evaluation, run)


def _compare(
    directory: Path,
    work: Path,
    recipes: Mapping[str, Recipe],
    keeps: Sequence[float],
    evaluation: Evaluation,
    run: Run,
) -> Comparison:
    inputs = _same_inputs(work, directory, recipes.values())
    cells = [_cell(DENSE, 1.0, None, directory, work, evaluation)]
    for keep in keeps:
        for name, template in recipes.items():
            recipe = template.model_copy(update={"keep": keep})
            if recipe.keeps_all:
                continue  # the dense model has its own row
            out = checkpoint_of(work, name, keep)
            compress(str(directory), out, recipe, run)
            cells.append(_cell(name, keep, recipe, out, work, evaluation))
            beside = Comparison(model=model_name(directory), cells=[cells[0], cells[-1]])
            add_results(out, markdown(beside))
    return Comparison(model=model_name(directory), inputs=inputs, cells=cells)


def _same_inputs(work: Path, directory: Path, recipes: Iterable[Recipe]) -> dict[str, str]:
    """Digests of the model and the calibration texts, which ``work`` also records.

    Later comparisons may add texts.

    Raises:
        UserError: ``work`` has recorded another digest.
    """
    record = work / "inputs.json"
    known = read_json(record) if record.exists() else {}
    found = {"model": TensorFiles(directory).fingerprint} | calibration_digests(recipes)
    for name, digest in found.items():
        if known.get(name, digest) != digest:
            raise UserError(f"{work}: holds results of another {name}; use another folder")
    if known | found != known:
        write_json(record, known | found)
    return found


def checkpoint_of(work: Path, name: str, keep: float) -> Path:
    """Path of a cell's checkpoint in the working folder."""
    return work / f"{name}-keep{keep:g}"


def _by_name(value: Any) -> Any:
    if isinstance(value, dict):
        return {_by_name(key): _by_name(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_by_name(item) for item in value]
    if isinstance(value, str) and "/" in value:
        parts = value.split("+")
        return "+".join(Path(part).name if Path(part).exists() else part for part in parts)
    return value


def _cell(
    name: str,
    keep: float,
    recipe: Recipe | None,
    directory: Path,
    work: Path,
    evaluation: Evaluation,
) -> Cell:
    out = checkpoint_of(work, name, keep)
    record = out.with_name(f"{out.name}.json")
    key = _key(evaluation, recipe)
    if record.exists():
        kept = read_json(record)
        if kept.get("key") == key:
            try:
                return Cell.model_validate(kept.get("cell"))
            except ValidationError as error:
                raise UserError(f"{record}: {explain(error)}; remove it") from None
    cell = Cell(
        name=name,
        keep=keep,
        recipe=recipe,
        stored_bytes=sum(info.nbytes for info in TensorFiles(directory).info.values()),
        perplexities=tuple(
            perplexity(
                directory,
                text,
                seq_len=evaluation.seq_len,
                max_chunks=evaluation.max_chunks,
                device=evaluation.device,
            )
            for text in evaluation.texts
        ),
        scores=task_accuracies(
            directory, evaluation.tasks, limit=evaluation.limit, device=evaluation.device
        )
        if evaluation.tasks
        else None,
    )
    write_json(record, {"key": key, "cell": cell.model_dump(mode="json")})
    return cell


def _key(evaluation: Evaluation, recipe: Recipe | None) -> str:
    """A digest of everything that the record of an evaluation depends on."""
    digests = [file_sha256(file) for file in evaluation.files]
    settings = evaluation.model_dump(mode="json"), recipe and recipe.model_dump(mode="json")
    return hashlib.sha256(json.dumps((*settings, digests)).encode()).hexdigest()


def markdown(comparison: Comparison) -> str:
    """The comparison as a table: bytes, perplexity and excess on every text, accuracy."""
    dense, *_ = comparison.cells
    texts = [Path(result.text).name for result in dense.perplexities]
    headings = ["model", "κ", "MiB", *(f"{text}: ppl (excess)" for text in texts)]
    if dense.scores is not None:
        headings += [score.task for score in dense.scores.scores] + ["mean accuracy"]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for cell in comparison.cells:
        row = [cell.name, f"{cell.keep:g}", f"{cell.stored_bytes / 2**20:,.1f}"]
        row += [
            f"{_short(result.perplexity)} ({cell.excess(dense, index):.3f})"
            for index, result in enumerate(cell.perplexities)
        ]
        if cell.scores is not None:
            values = [score.accuracy for score in cell.scores.scores]
            row += [f"{value:.3f}" for value in (*values, cell.accuracy)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _short(perplexity: float) -> str:
    """The perplexity with two decimals, or with two digits if the model is broken."""
    return f"{perplexity:.2f}" if perplexity < _BROKEN else f"{perplexity:.1e}"


def plot(comparison: Comparison, file: Path) -> None:
    """Perplexity on the first text against stored bytes, one line for each recipe.

    Raises:
        UserError: matplotlib is not installed, or the comparison has no text.
    """
    dense, *others = comparison.cells
    if not dense.perplexities:
        raise UserError("the plot shows perplexity; give a text")
    axes = (figure := new_figure(7, 4.5)).subplots()
    axes.axhline(dense.perplexities[0].perplexity, color="grey", linestyle="--", label=DENSE)
    for name in dict.fromkeys(cell.name for cell in others):
        mine = sorted((c for c in others if c.name == name), key=lambda cell: cell.stored_bytes)
        axes.plot(
            [cell.stored_bytes / 2**20 for cell in mine],
            [cell.perplexities[0].perplexity for cell in mine],
            marker="o",
            label=name,
        )
    axes.set(
        xlabel="stored weights, MiB",
        ylabel=f"perplexity on {Path(dense.perplexities[0].text).name}",
        yscale="log",
        title=comparison.model,
    )
    axes.legend()
    save_figure(figure, file)


def print_comparison(comparison: Comparison) -> None:
    Console().print(markdown(comparison), markup=False, highlight=False, soft_wrap=True)
