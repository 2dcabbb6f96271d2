"""The training loop: AdamW over given weights, with held-out loss and early stop.

The caller chooses the weights and the loss (``Objective``), for end-to-end refinement, block
refinement or learned scores. Some of the calibration sequences are held out. The loop returns the
weights of least held-out loss after rounding for storage, including the initial weights, so the
result is never worse than these on the held-out sequences.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from safetensors.torch import load_file
from torch import Tensor, nn

from svdserve.compression.format.codecs import Storage
from svdserve.compression.format.tensors import save_tensors
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.precision import Precision

LOG = "training.jsonl"
_STATE = "training.safetensors"
_BEST = "best.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Training(BaseModel):
    """Settings of a training; equal settings on equal tokens give equal results."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: PositiveInt = Field(default=3, description="The number of passes over the sequences.")
    batch_size: PositiveInt = Field(default=2, description="The number of sequences in a step.")
    learning_rate: PositiveFloat = Field(
        default=1e-4,
        allow_inf_nan=False,
        description="The peak of AdamW's learning rate, which then falls along a cosine.",
    )
    warmup: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="The share of the steps in which the learning rate rises to its peak.",
    )
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="The share of the sequences that is held out. The training does not use these "
        "sequences; it measures the loss on them.",
    )
    evaluations: PositiveInt = Field(
        default=8, description="How many times the held-out loss is measured."
    )
    patience: PositiveInt = Field(
        default=3,
        description="The training stops after this number of evaluations without improvement.",
    )
    precision: Precision = Field(
        default="bfloat16",
        description="The precision of matrix products. Weights and gradients are float32.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="The seed that draws the held-out sequences and the order of the others.",
    )

    def check_sequences(self, sequences: int) -> None:
        """Raise UserError if holding out a sequence leaves none for training."""
        if sequences < 2:
            raise UserError(
                "one calibration sequence cannot be both trained on and held out; give more tokens "
                "or a smaller seq_len"
            )

    def split(self, sequences: int) -> tuple[Tensor, Tensor]:
        """Indices of the training sequences and of the held-out sequences; the seed draws them."""
        held = min(sequences - 1, max(1, round(sequences * self.held_out)))
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(sequences, generator=generator)
        return order[held:], order[:held]

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


class Objective(Protocol):
    """A loss: the mean over all positions of the calibration sequences of indices ``rows``."""

    def backward(self, rows: Tensor, step: int) -> None:
        """Add the loss's gradient to the ``grad`` of the weights; ``step`` counts from 0."""

    def evaluate(self, rows: Tensor) -> float:
        """The loss, computed without gradients."""


@dataclass(frozen=True)
class State:
    """The state of a training at its last evaluation: finished steps and held-out losses."""

    step: int
    before: float
    best: float
    worse: int = 0
    """Number of evaluations in a row without improvement."""


class Trainer:
    """Trains ``parameters`` in place.

    Args:
        parameters: the float32 weights, by name.
        stored: codec and dtype of each, by name; the held-out loss is measured after rounding.
        objective: computes gradients and losses.
        settings: the settings of the training.
        sequences: the number N of sequences.
        folder: the folder for the state. A killed training goes on from its last evaluation and
            gives the same bytes; without a folder it starts over.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        stored: Mapping[str, Storage],
        objective: Objective,
        settings: Training,
        sequences: int,
        folder: Path | None = None,
    ) -> None:
        self.parameters, self.stored, self.objective = dict(parameters), dict(stored), objective
        self.settings, self.folder = settings, folder
        self.seen, self.held = settings.split(sequences)
        self.steps = settings.epochs * math.ceil(len(self.seen) / settings.batch_size)
        self._best: dict[str, Tensor] = {}
        # train() sets the learning rate. Fused AdamW needs one pass over memory instead of ten.
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def train(self, notify: Callable[[int, State], None] = lambda *_: None) -> State:
        """Train to the end or to the early stop; calls ``notify`` with finished steps and state."""
        state = self._load()
        if state is None:
            loss = self.held_out_loss()
            state = State(0, loss, loss)
            self._keep()
        count = min(self.settings.evaluations, self.steps)
        marks = {self.steps * (i + 1) // count for i in range(count)}
        for step, rows in enumerate(self._batches()):
            if step < state.step:
                continue
            if state.worse >= self.settings.patience:
                break
            notify(step, state)
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            self.objective.backward(rows, step)
            nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            if step + 1 in marks:
                state = self._judge(step + 1, state)
        notify(state.step, state)
        return state

    def best(self) -> dict[str, Tensor]:
        """The stored tensors (``Storage.encode``) of least held-out loss by name, on the CPU."""
        return load_file(self.folder / _BEST) if self.folder is not None else self._best

    def held_out_loss(self) -> float:
        """The loss on the held-out sequences, with the weights rounded as for storage."""
        with self._as_stored():
            parts = torch.split(self.held, self.settings.batch_size)
            total = sum(self.objective.evaluate(rows) * len(rows) for rows in parts)
        return total / len(self.held)

    def _judge(self, step: int, state: State) -> State:
        loss = self.held_out_loss()
        better = loss < state.best  # false for NaN
        if better:
            self._keep()
        best, worse = (loss, 0) if better else (state.best, state.worse + 1)
        state = State(step, state.before, best, worse)
        if self.folder is not None:
            self._save(self.folder, state)
            with (self.folder / LOG).open("a") as log:
                fields = {"event": "training", "loss": loss, **asdict(state)}
                log.write(json.dumps(fields) + "\n")
        return state

    def _batches(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.settings.seed + 1)
        for _ in range(self.settings.epochs):
            order = torch.randperm(len(self.seen), generator=generator)
            yield from torch.split(self.seen[order], self.settings.batch_size)

    def _learning_rate(self, step: int) -> float:
        warm = max(1, round(self.settings.warmup * self.steps))
        if step < warm:
            return self.settings.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.settings.learning_rate * (1 + math.cos(math.pi * done)) / 2

    @contextmanager
    def _as_stored(self) -> Iterator[None]:
        exact = {n: p.detach().clone() for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.stored[name].rounded(parameter.data))
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(exact[name])

    def _keep(self) -> None:
        best: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            best |= self.stored[name].encode(name, parameter.detach())
        if self.folder is not None:
            save_tensors(best, self.folder / _BEST)
        else:
            self._best = {name: tensor.clone() for name, tensor in best.items()}

    def _save(self, folder: Path, state: State) -> None:
        tensors = {
            "state": torch.tensor([state.step, state.worse]),
            "losses": torch.tensor([state.before, state.best], dtype=torch.float64),
        }
        for name, parameter in self.parameters.items():
            tensors[name] = parameter.detach()
            for key in _MOMENTS:
                tensors[f"{name}.{key}"] = self._optimizer.state[parameter][key]
        save_tensors({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / _STATE)

    def _load(self) -> State | None:
        if self.folder is None or not (self.folder / _STATE).exists():
            return None
        tensors = load_file(self.folder / _STATE)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])
            self._optimizer.state[parameter] = {
                key: tensors[f"{name}.{key}"].to(parameter.device) for key in _MOMENTS
            }
        step, worse = tensors["state"].tolist()
        before, best = tensors["losses"].tolist()
        return State(step, before, best, worse)
