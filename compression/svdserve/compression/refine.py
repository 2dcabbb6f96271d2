"""Refinement: train the factors, and nothing else, towards the dense model's predictions.

The loss is KL(teacher ‖ student) over the vocabulary, mean over the tokens of calibration text.
Tuning the factors end to end on the calibration data beats every closed form in the literature
(Three-Level, HKUST-GZ 2026; AA-SVD, arXiv 2604.02119). Part of the text is held out: the factors
that are written are those of least held-out loss as they will be stored, so that the result is
never worse there than what was given.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import kl_div

from svdserve.compression.calibration import calibration_tokens, check_calibration
from svdserve.compression.checkpoint import LOG_FILE, TensorFiles, open_checkpoint, read_json
from svdserve.compression.errors import UserError
from svdserve.compression.evaluate import load_model
from svdserve.compression.modules import FactoredWeight
from svdserve.compression.recipe import Run, make_recipe
from svdserve.compression.skeleton import resolve_model
from svdserve.compression.workdir import WorkDirectory, save_tensors

_STATE = "refine.safetensors"
_BEST = "best.safetensors"
_LOG = "refine.jsonl"


class Refinement(BaseModel):
    """What is trained, on what, and for how long; equal settings give equal factors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: str = Field(default="self", description="text file, hf:DATASET or self")
    tokens: PositiveInt = Field(
        default=131_072, description="calibration tokens, the held-out ones among them"
    )
    seq_len: PositiveInt = Field(default=1024, description="tokens of a sequence")
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share of the sequences")
    epochs: PositiveInt = 1
    batch_size: PositiveInt = Field(default=2, description="sequences of a step")
    learning_rate: PositiveFloat = Field(default=1e-4, description="AdamW's peak, then a cosine")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    evaluations: PositiveInt = Field(default=8, description="times that held-out loss is measured")
    patience: PositiveInt = Field(default=2, description="evaluations without gain before it stops")
    precision: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of matrix products; weights and gradients are float32"
    )
    seed: int = 0


@dataclass(frozen=True)
class RefineReport:
    """Held-out KL in nats per token, before and after, and what it took."""

    directory: Path
    before: float
    after: float
    steps: int
    seconds: float


def refine(
    teacher: str, student: Path, out: Path, settings: Refinement, run: Run | None = None
) -> RefineReport:
    """Write ``student`` with better factors to ``out``; both models are in memory meanwhile.

    Args:
        teacher: the dense model, a directory or a Hub name.
        student: a checkpoint of it.
        out: the new checkpoint; appears when it is complete.
        settings: the training.
        run: device, resume and force; with ``resume`` a killed run goes on from its last
            evaluation and ends in the same bytes.

    Raises:
        UserError: anything wrong with the input, found before the models are loaded.
    """
    return _Trainer(resolve_model(teacher), student, out, settings, run or Run()).execute()


class _Trainer:
    def __init__(
        self, teacher: Path, student: Path, out: Path, settings: Refinement, run: Run
    ) -> None:
        open_checkpoint(student)
        self.work = WorkDirectory(out, resume=run.resume, force=run.force)
        self.text = make_recipe(
            **settings.model_dump(include={"calibration", "tokens", "seq_len", "seed"})
        )
        check_calibration(teacher, self.text)
        if self.text.sequences < 2:
            raise UserError(
                f"tokens is {settings.tokens}: one sequence of {settings.seq_len} cannot be both "
                "trained on and held out; give more tokens or a smaller seq_len"
            )
        self.paths, self.settings, self.run = (teacher, student), settings, run
        self.device = torch.device(run.device)
        if run.threads is not None:
            torch.set_num_threads(run.threads)

    def execute(self) -> RefineReport:
        started = time.perf_counter()
        self.work.open(self._signature())
        tokens = self.work.tokens()
        if tokens is None:
            tokens = calibration_tokens(self.paths[0], self.text)
            self.work.save_tokens(tokens)
        held = max(1, round(len(tokens) * self.settings.held_out))
        order = torch.randperm(
            len(tokens), generator=torch.Generator().manual_seed(self.settings.seed)
        )
        self.held, self.seen = tokens[order[:held]], tokens[order[held:]]
        self.teacher = load_model(self.paths[0], "float32", self.run.device)
        self.student = load_model(self.paths[1], "float32", self.run.device)
        self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.student.config.use_cache = False
        self.factors = self._trainable()
        info = TensorFiles(self.paths[1]).info
        self.stored = {name: info[name].dtype for name in self.factors}
        report = self._train()
        self._publish()
        return RefineReport(
            self.work.out, **report, seconds=round(time.perf_counter() - started, 3)
        )

    def _signature(self) -> dict[str, dict[str, Any]]:
        return {
            "refinement": self.settings.model_dump(mode="json"),
            "weights": {
                str(file): file.stat().st_size
                for path in self.paths
                for file in TensorFiles(path).paths
            },
        }

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The factors by their names in the checkpoint; everything else is frozen."""
        self.teacher.requires_grad_(False)
        self.student.requires_grad_(False)
        found: dict[str, nn.Parameter] = {}
        for path, module in self.student.named_modules():
            if isinstance(module, FactoredWeight):
                for suffix, parameter in module.named_parameters(recurse=False):
                    if suffix.startswith("factor"):
                        parameter.requires_grad_(True)
                        found[f"{path}.{suffix}"] = parameter
        return found

    # Training

    @property
    def _steps(self) -> int:
        return self.settings.epochs * math.ceil(len(self.seen) / self.settings.batch_size)

    @property
    def _evaluations(self) -> int:
        return min(self.settings.evaluations, self._steps)

    def _train(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.factors.values(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0
        )
        marks = [self._steps * (i + 1) // self._evaluations for i in range(self._evaluations)]
        state = self._load(optimizer)
        if state is None:
            loss = self._held_out_loss()
            state = {"step": 0, "before": loss, "best": loss, "worse": 0}
            self._save_best()
        steps = track(
            enumerate(self._batches()),
            "refining",
            total=self._steps,
            console=Console(stderr=True),
            disable=not self.run.progress,
        )
        for step, batch in steps:
            if step < state["step"]:
                continue
            if state["worse"] >= self.settings.patience:
                break
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            self.student.train()  # checkpointing works in this mode only
            optimizer.zero_grad(set_to_none=True)
            self._loss(batch.to(self.device)).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.factors.values(), 1.0)
            optimizer.step()
            if step + 1 in marks:
                loss = self._held_out_loss()
                better = loss < state["best"]
                if better:
                    self._save_best()
                state = {
                    "step": step + 1,
                    "before": state["before"],
                    "best": loss if better else state["best"],
                    "worse": 0 if better else state["worse"] + 1,
                }
                self._save(optimizer, state)
                with (self.work.path / _LOG).open("a") as log:
                    log.write(json.dumps({"event": "refine", "loss": loss, **state}) + "\n")
        return {"before": state["before"], "after": state["best"], "steps": state["step"]}

    def _batches(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.settings.seed + 1)
        for _ in range(self.settings.epochs):
            order = torch.randperm(len(self.seen), generator=generator)
            yield from torch.split(self.seen[order], self.settings.batch_size)

    def _learning_rate(self, step: int) -> float:
        warm = max(1, round(self.settings.warmup * self._steps))
        if step < warm:
            return self.settings.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, self._steps - warm)
        return self.settings.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def _loss(self, batch: Tensor) -> Tensor:
        """KL(teacher ‖ student) in nats per token of batch [B, L]."""
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"
        )
        with autocast:
            with torch.no_grad():
                target = self.teacher(batch, use_cache=False).logits
            logits = self.student(batch, use_cache=False).logits
        target, logits = (value.float().log_softmax(-1).flatten(0, 1) for value in (target, logits))
        return kl_div(logits, target, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """With the factors rounded to what the checkpoint stores."""
        exact = {name: factor.detach().clone() for name, factor in self.factors.items()}
        for name, factor in self.factors.items():
            factor.copy_(factor.to(self.stored[name]))
        self.student.eval()
        batches = torch.split(self.held, self.settings.batch_size)
        total = sum(float(self._loss(b.to(self.device))) * len(b) for b in batches)
        for name, factor in self.factors.items():
            factor.copy_(exact[name])
        return total / len(self.held)

    # Files

    def _save_best(self) -> None:
        rounded = {
            name: factor.detach().to(self.stored[name]).cpu().contiguous()
            for name, factor in self.factors.items()
        }
        save_tensors(rounded, self.work.path / _BEST)

    def _save(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        tensors = {"state": torch.tensor([state["step"], state["worse"]])}
        tensors["losses"] = torch.tensor([state["before"], state["best"]], dtype=torch.float64)
        for name, factor in self.factors.items():
            moments = optimizer.state[factor]
            tensors[name] = factor.detach()
            for key in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"{name}.{key}"] = moments[key]
        save_tensors({n: t.cpu().contiguous() for n, t in tensors.items()}, self.work.path / _STATE)

    def _load(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        path = self.work.path / _STATE
        if not path.exists():
            return None
        tensors = load_file(path)
        for name, factor in self.factors.items():
            factor.data.copy_(tensors[name])
            optimizer.state[factor] = {
                key: tensors[f"{name}.{key}"].to("cpu" if key == "step" else self.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        step, worse = tensors["state"].tolist()
        before, best = tensors["losses"].tolist()
        return {"step": step, "before": before, "best": best, "worse": worse}

    def _publish(self) -> None:
        """The student's directory with the best factors in it."""
        final, source = self.work.final(), self.paths[1]
        others = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(source, final, dirs_exist_ok=True, ignore=others)
        best = load_file(self.work.path / _BEST)
        for file in TensorFiles(source).paths:
            tensors = load_file(file)
            replaced = {name: best.get(name, tensor) for name, tensor in tensors.items()}
            save_tensors(replaced, final / file.name)
        config = read_json(source / "config.json")
        recipe = config["quantization_config"].setdefault("recipe", {})
        recipe["refinement"] = self.settings.model_dump(mode="json")
        (final / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        with (final / LOG_FILE).open("a") as log:
            log.write((self.work.path / _LOG).read_text())
        self.work.publish(final)
