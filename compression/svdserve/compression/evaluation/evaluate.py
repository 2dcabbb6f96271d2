"""Perplexity and task accuracy of one or several models, dense or compressed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from svdserve.compression.evaluation.options import SingleEvaluation
from svdserve.compression.evaluation.perplexity import Perplexity, perplexity
from svdserve.compression.evaluation.tasks import TaskAccuracies, check_tasks, task_accuracies
from svdserve.compression.model.hub import resolve_model
from svdserve.compression.system.errors import UserError, explain
from svdserve.compression.system.machine import usable_device


class Results(BaseModel):
    """The perplexities of all models on each text, and the task accuracies of every model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexities: tuple[Perplexity, ...]
    scores: tuple[TaskAccuracies, ...]

    def portable(self) -> list[dict[str, Any]]:
        """JSON for a results file: perplexities, then task accuracies."""
        return [found.model_dump(mode="json") for found in (*self.perplexities, *self.scores)]


def evaluate(models: Sequence[str | Path], **options: Any) -> Results:
    """Measure perplexity on texts, accuracy on multiple-choice tasks, or both.

    Args:
        models: directories or Hub names; the results name the models in the same way.
        options: the fields of ``SingleEvaluation``, such as texts, tasks, seq_len and device.

    Raises:
        UserError: there is nothing to measure, a model, text or task does not exist, or logits are
            not finite. Options and local tasks are checked before the first model is loaded.
    """
    try:
        asked = SingleEvaluation(**options)
    except ValidationError as error:
        raise UserError(explain(error)) from None
    if not asked.texts and not asked.tasks:
        raise UserError("nothing to evaluate; give a text, a task, or both")
    check_tasks(asked.tasks, asked.limit)
    usable_device(asked.device)
    directories = [resolve_model(model) for model in models]
    common: dict[str, Any] = {"dtype": asked.dtype, "device": asked.device}
    if asked.batch_size is not None:
        common["batch_size"] = asked.batch_size
    chunks: dict[str, Any] = {"seq_len": asked.seq_len, "max_chunks": asked.max_chunks}
    named = list(zip(map(str, models), directories, strict=True))
    return Results(
        perplexities=tuple(
            perplexity(directory, text, **chunks, **common).model_copy(update={"model": name})
            for text in asked.texts
            for name, directory in named
        ),
        scores=tuple(
            task_accuracies(directory, asked.tasks, limit=asked.limit, **common).model_copy(
                update={"model": name}
            )
            for name, directory in named
            if asked.tasks
        ),
    )
