"""Multiple-choice accuracy with lm-evaluation-harness, on its own tasks or on local JSONL files.

A line of a file is {"context": str, "choices": [str, ...], "gold": index}. A request is context, a
space and a choice. acc predicts the choice of the largest log-probability; acc_norm first divides
the log-probability by the number of characters of the choice.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt

from svdserve.compression.evaluation.options import REQUESTS_OF_A_STEP
from svdserve.compression.evaluation.perplexity import Measurement, measured
from svdserve.compression.format.integrity import file_sha256
from svdserve.compression.system.errors import UserError

_SUFFIX = ".jsonl"
# Tasks whose choices have very different lengths.
NORMALISED = ("hellaswag", "openbookqa", "arc_challenge")


class TaskAccuracy(BaseModel):
    """Accuracies of one task, from 0 to 1; None if the task does not define them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    items: PositiveInt
    acc: float | None
    acc_norm: float | None
    sha256: str | None = None
    """SHA-256 of a local task's file."""

    @property
    def accuracy(self) -> float:
        """The accuracy that the literature reports: acc_norm for tasks of NORMALISED, else acc.

        If the task defines only the other accuracy, that is returned; if it defines neither, 0.
        """
        first, second = self.acc, self.acc_norm
        if self.task.startswith(NORMALISED):
            first, second = second, first
        return (second if first is None else first) or 0.0


class TaskAccuracies(Measurement):
    """The accuracies of one model on all tasks."""

    scores: tuple[TaskAccuracy, ...]
    limit: PositiveInt | None

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the tasks."""
        return sum(score.accuracy for score in self.scores) / len(self.scores)


def task_accuracies(
    model_dir: Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = REQUESTS_OF_A_STEP,
    dtype: str = "auto",
    device: str = "cpu",
) -> TaskAccuracies:
    """Accuracies of a dense or compressed model.

    Args:
        tasks: JSONL files, whose names end in .jsonl, or names that lm-evaluation-harness knows.
        limit: number of items to use from the start of each task; None for all.
        batch_size: number of requests in a forward step.
        dtype: dtype of weights and activations. The softmax is always float32, because rounding it
            to bfloat16 changes accuracies by percentage points.

    Raises:
        UserError: the model, a file or a task does not exist, a line is invalid, or the harness is
            not installed.
    """
    started = time.perf_counter()
    files = check_tasks(tasks, limit)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError("tasks need lm-evaluation-harness: pip install 'svdserve[eval]'") from None
    from svdserve.compression.model.building import check_ids, load_tokenizer
    from svdserve.compression.model.loading import load_model

    class Checked(HFLM):  # type: ignore[misc]
        """Refuses token ids that have no embedding before torch indexes the embedding."""

        def tok_encode(self, *args: Any, **options: Any) -> list[int]:
            ids: list[int] = super().tok_encode(*args, **options)
            check_ids(model_dir, model.config, torch.tensor(ids or [0]), ", ".join(tasks))
            return ids

    tokenizer = load_tokenizer(model_dir)
    model = load_model(model_dir, dtype, device)
    wrapped = Checked(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=device,
        softmax_dtype="float32",
    )
    wanted: list[str | dict[str, Any]] = [_local(name, file) for name, file in files.items()]
    wanted += [task for task in tasks if not task.endswith(_SUFFIX)]
    try:
        found = simple_evaluate(
            wrapped, tasks=wanted, limit=limit, bootstrap_iters=0, log_samples=False
        )
    except UserError:
        raise
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise UserError(f"lm-evaluation-harness: {str(error).strip() or repr(error)}") from None
    return TaskAccuracies(
        scores=tuple(
            TaskAccuracy(
                task=name,
                items=found["n-samples"][name]["effective"],
                acc=result.get("acc,none"),
                acc_norm=result.get("acc_norm,none"),
                sha256=file_sha256(files[name]) if name in files else None,
            )
            for name, result in found["results"].items()
            if name in found["n-samples"]
        ),
        limit=limit,
        **measured(model_dir, model, device, started),
    )


def check_tasks(tasks: Sequence[str], limit: int | None = None) -> dict[str, Path]:
    """Check local task files and the limit before a model is loaded.

    Returns:
        The local files by the names of their tasks.

    Raises:
        UserError: a task is a path without the suffix, a file does not exist or has an invalid line
            or no line, two files have the same name, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: give at least 1, or leave it out for all")
    files: dict[str, Path] = {}
    for task in tasks:
        file = Path(task)
        if not task.endswith(_SUFFIX):
            if len(file.parts) > 1 or file.is_file():
                raise UserError(
                    f"{task}: is no task; give a file whose name ends in {_SUFFIX}, or the name of "
                    "a task of lm-evaluation-harness, which is no path"
                )
            continue
        if file.stem in files:
            raise UserError(f"{file}: another task is also called {file.stem}; rename one")
        files[file.stem] = file
        _check(file)
    return files


def _local(name: str, file: Path) -> dict[str, Any]:
    """The configuration of the harness for a JSONL file."""
    metrics = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": metrics,
    }


def _check(file: Path) -> None:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read as UTF-8 text ({error}); give a JSONL file that you may read"
        ) from None
    for number, line in enumerate(lines, start=1):
        try:
            item = json.loads(line)
            context, choices, gold = item["context"], item["choices"], item["gold"]
            words = [context, *choices] if isinstance(choices, list) else [None]
            good = all(isinstance(word, str) for word in words) and 0 <= gold < len(choices)
            good = good and isinstance(gold, int) and not isinstance(gold, bool)
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise UserError(
                f"{file}: line {number} is not a multiple-choice item; expected an object with "
                "context, choices and gold (the index of the right choice)"
            )
    if not lines:
        raise UserError(f"{file}: has no items; give a file with one item on each line")
