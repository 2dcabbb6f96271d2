"""Refinement: train only the factors, end to end, towards the dense model's predictions.

Training the factors on the calibration data beats every closed form in the literature (Three-Level,
HKUST-GZ 2026; AA-SVD, arXiv 2604.02119). The loop is in trainer.py, the loss in distillation.py.
Memory holds the student in float32, gradients, AdamW's two moments and the activations of one step;
the teacher is freed once its targets are on disk. Int8 factors are trained in float32, but they are
evaluated and written as rounded to int8.
"""

import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from svdserve.compression.format.codecs import Storage, get_codec, revisions
from svdserve.compression.format.log import LOG_FILE, log_event
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.format.tensors import TensorFiles, save_tensors
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.model.companions import copy_companions
from svdserve.compression.model.hub import resolve_model
from svdserve.compression.model.loading import load_model
from svdserve.compression.model.modules import imitate_server, trainable_factors
from svdserve.compression.pipeline.calibration.tokens import (
    calibration_digests,
    calibration_tokens,
    check_calibration,
)
from svdserve.compression.pipeline.card import CARD_FILE, model_card
from svdserve.compression.pipeline.progress import bar
from svdserve.compression.pipeline.recipe import Recipe, Refinement, Run, dump_recipe, make_recipe
from svdserve.compression.pipeline.report import RefineReport
from svdserve.compression.pipeline.workdir import WorkDirectory, execution_fingerprint
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.machine import usable_device
from svdserve.compression.training.distillation import Distillation, Targets
from svdserve.compression.training.trainer import LOG, State, Trainer

_TEXT = ("calibration", "tokens", "seq_len", "seed")


def refine(
    teacher: str,
    student: Path,
    out: Path,
    settings: Refinement,
    run: Run | None = None,
    tokens: Tensor | None = None,
) -> RefineReport:
    """Write the checkpoint ``student`` with refined factors to ``out``.

    Args:
        teacher: the dense model, a directory or a Hub name.
        student: a checkpoint of the dense model.
        out: the new checkpoint; one rename creates it when it is complete.
        settings: the settings of the training; calibration fields that it does not set come from
            the student's recipe (for untrusted students see ``check_own_calibration``).
        run: device, resume and force; with ``resume`` a killed run goes on from its last
            evaluation and writes the same bytes.
        tokens: calibration tokens [N, L] to use instead of drawing some.

    Raises:
        UserError: the input is wrong, which is found before the models are loaded.
    """
    return _Refiner(resolve_model(teacher), student, out, settings, run or Run(), tokens).execute()


def check_own_calibration(student: Path, settings: Refinement) -> None:
    """Refuse to read files and datasets that only the recipe of an untrusted checkpoint names.

    Raises:
        UserError: ``settings`` uses the calibration of the student's recipe, and that is not
            ``self``.
    """
    stored = open_checkpoint(student).config.recipe.get("calibration", "self")
    named = settings.calibration is not None and "same" not in settings.calibration.split("+")
    if stored != "self" and not named:
        raise UserError(
            f"{student}: its recipe names a calibration text, which svdserve reads only if you "
            f"name it yourself: give --calibration {shlex.quote(str(stored))}"
        )


_SAME = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def _require_same_model(teacher: Path, student: Path) -> None:
    """Raise UserError unless the student can be a compression of the teacher."""
    dense, small = read_json(teacher / "config.json"), read_json(student / "config.json")
    if dense.get("quantization_config") is not None:
        raise UserError(f"{teacher}: is compressed; give the dense model as the teacher")
    for name in _SAME:
        if dense.get(name) != small.get(name):
            raise UserError(
                f"{teacher}: {name} is {dense.get(name)!r}, but {small.get(name)!r} in {student}; "
                "give the dense model that this checkpoint was made from"
            )
    # Compression does not change vectors such as those of norms, but other training does.
    ours, theirs = TensorFiles(student), TensorFiles(teacher)
    both = [name for name, info in ours.info.items() if len(info.shape) == 1 and name in theirs]
    stored, given = ours.load(both), theirs.load(both)
    for name in both:
        if not torch.equal(stored[name], given[name].to(stored[name].dtype)):
            raise UserError(
                f"{teacher}: {name} differs from {student}; give the dense model that this "
                "checkpoint was made from"
            )


class _Refiner:
    def __init__(
        self,
        teacher: Path,
        student: Path,
        out: Path,
        settings: Refinement,
        run: Run,
        tokens: Tensor | None,
    ) -> None:
        self.config = open_checkpoint(student).config
        if not self.config.modules:
            raise UserError(
                f"{student}: has no factors to refine, because every linear is dense; give a "
                "checkpoint with a keep ratio below 1"
            )
        _require_same_model(teacher, student)
        self.teacher, self.student = teacher, student
        self.settings, self.run, self.tokens = settings, run, tokens
        own = {key: value for key, value in self.config.recipe.items() if key in _TEXT}
        self.text = settings.text(make_recipe(**own))
        if tokens is None:
            check_calibration(teacher, self.text)
        settings.check_sequences(self.text.sequences)
        self.work = WorkDirectory(
            out,
            resume=run.resume,
            force=run.force,
            inputs=[teacher, student, *self.text.text_files],
            resume_anyway=run.resume_anyway,
        )
        self.device = usable_device(run.device)
        if run.threads is not None:
            torch.set_num_threads(run.threads)

    def execute(self) -> RefineReport:
        with self.work.locked():
            return self._execute()

    def _execute(self) -> RefineReport:
        started = time.perf_counter()
        if (facts := self.work.open(self._signature())) is not None:
            return RefineReport(self.work.out, **facts, made=False)
        tokens = self.work.tokens(self._draw)
        self.settings.check_sequences(len(tokens))
        targets = Targets(self.work.path / "targets")
        with bar(self.run.progress) as shown:
            task = shown.add_task("teacher", total=len(tokens), facts="")
            targets.compute(
                self.teacher,
                tokens,
                self.device,
                self.settings,
                lambda done: shown.update(task, completed=done),
            )
            trainer = self._trainer(tokens, targets)
            task = shown.add_task("refining", total=trainer.steps, facts="")

            def notify(step: int, state: State) -> None:
                facts = f"held-out KL {state.before:.4f}, best {state.best:.4f}"
                shown.update(task, completed=step, facts=facts)

            state = trainer.train(notify)
        facts = {"before": state.before, "after": state.best, "steps": state.step}
        facts["seconds"] = round(time.perf_counter() - started, 3)
        self._publish(trainer.best(), facts)
        return RefineReport(self.work.out, **facts)

    def _signature(self) -> dict[str, dict[str, Any]]:
        specs = [*self.config.modules.values(), *self.config.linears.values()]
        return {
            "refinement": self.settings.model_dump(mode="json"),
            "text": self.text.model_dump(mode="json", include=set(_TEXT)),
            "weights": {
                "teacher": TensorFiles(self.teacher).fingerprint,
                "student": TensorFiles(self.student).fingerprint,
                **revisions(spec.codec for spec in specs),
            },
            "texts": calibration_digests([self.text] if self.tokens is None else []),
            "order": execution_fingerprint(self.device, self.settings.batch_size),
        }

    def _draw(self) -> Tensor:
        if self.tokens is not None:
            return self.tokens
        shown = self.run.progress
        return calibration_tokens(self.teacher, self.text, self.device, progress=shown)

    def _trainer(self, tokens: Tensor, targets: Targets) -> Trainer:
        student = load_model(self.student, "float32", str(self.device))
        if self.run.checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        imitate_server(student)
        factors = trainable_factors(student)
        modules, info = self.config.modules, TensorFiles(self.student).info
        return Trainer(
            factors,
            {
                name: Storage(get_codec(modules[name.rpartition(".")[0]].codec), info[name].dtype)
                for name in factors
            },
            Distillation(student, tokens, targets, self.settings),
            self.settings,
            len(tokens),
            self.work.path,
        )

    def _publish(self, best: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Publish a copy of the student's directory with the best factors."""
        final, source = self.work.final(), self.student
        copy_companions(source, final)
        for own in (CARD_FILE, LOG_FILE, "recipe.yaml"):
            if (source / own).is_file():
                shutil.copyfile(source / own, final / own)
        for file in TensorFiles(source).paths:
            replaced = {name: best.get(name, tensor) for name, tensor in load_file(file).items()}
            save_tensors(replaced, final / file.name)
        config = read_json(source / "config.json")
        recipe = config["quantization_config"].setdefault("recipe", {})
        recipe["refinement"] = self.settings.model_dump(mode="json")
        (final / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for change in self.work.reordered:
            log_event(final / LOG_FILE, "resumed_anyway", **change)
        if self.config.recipe:
            self._describe(make_recipe(**recipe), final)
        with (final / LOG_FILE).open("a") as log:
            log.write((self.work.path / LOG).read_text())
        self.work.publish(final, facts)

    def _describe(self, recipe: Recipe, final: Path) -> None:
        (final / "recipe.yaml").write_text(dump_recipe(recipe))
        card = model_card(open_checkpoint(final), recipe, self.student)
        (final / CARD_FILE).write_text(card, encoding="utf-8")
