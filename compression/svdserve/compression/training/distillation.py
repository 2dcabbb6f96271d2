"""The end-to-end objective: KL(teacher ‖ student) over the vocabulary, in nats per token.

The teacher runs once; its final hidden states of all tokens are stored in files, and it is freed.
Compression does not change the head, so the student's head turns these hidden states into the
teacher's logits. Logits are computed for a slice of positions at a time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from svdserve.compression.format.tensors import save_tensors
from svdserve.compression.model.loading import head_logits, load_model
from svdserve.compression.system.memory import release
from svdserve.compression.training.trainer import Training

_SLICE = 512  # positions whose logits are in memory at the same time
_CACHED = 16  # positions whose float32 probabilities fit into a processor's cache


class Targets:
    """The teacher's final hidden states [N, L, d], one file for each sequence in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _file(self, row: int) -> Path:
        return self._folder / f"{row:06d}.safetensors"

    def read(self, rows: Tensor) -> Tensor:
        """The hidden states [B, L, d] of the sequences with the indices ``rows`` [B]."""
        return torch.stack([load_file(self._file(row))["hidden"] for row in rows.tolist()])

    @torch.no_grad()
    def compute(
        self,
        teacher: Path,
        tokens: Tensor,
        device: torch.device,
        settings: Training,
        notify: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Run the teacher over the sequences of tokens [N, L] that have no file, and free it.

        Args:
            teacher: the dense model.
            tokens: all sequences.
            device: the device of the teacher.
            settings: their precision is the dtype of the files, and their batch size is used.
            notify: called with the number of finished sequences.
        """
        self._folder.mkdir(exist_ok=True)
        missing = [row for row in range(len(tokens)) if not self._file(row).exists()]
        if not missing:
            return
        model = load_model(teacher, "float32", str(device))
        dtype = getattr(torch, settings.precision)
        for rows in torch.split(torch.tensor(missing), settings.batch_size):
            notify(int(rows[0]))
            with settings.autocast(device):
                hidden = _final_hidden(model, tokens[rows].to(device))
            for row, value in zip(rows.tolist(), hidden.to(device="cpu", dtype=dtype), strict=True):
                save_tensors({"hidden": value.clone()}, self._file(row))
        del model
        release()


class Distillation:
    """Objective (trainer.py) of a student, a transformers causal language model.

    Args:
        student: the student in float32, on the device of the training; parameters that require a
            gradient are trained. With gradient checkpointing enabled, activations are computed
            again in the backward pass.
        tokens: calibration tokens [N, L].
        targets: the teacher's hidden states for the same tokens.
        settings: their precision is used here.
    """

    def __init__(self, student: Any, tokens: Tensor, targets: Targets, settings: Training) -> None:
        self.student, self.tokens, self.targets, self.settings = student, tokens, targets, settings
        head = student.get_output_embeddings()
        self._device = head.weight.device
        if settings.precision == "bfloat16":
            # Autocast would cast the frozen head, the largest weight, at every call.
            head.weight = nn.Parameter(head.weight.detach().bfloat16(), requires_grad=False)

    def backward(self, rows: Tensor, step: int) -> None:  # noqa: ARG002
        self.student.train()  # gradient checkpointing works only in this mode
        with self.settings.autocast(self._device):
            hidden = _final_hidden(self.student, self.tokens[rows].to(self._device))
            _, gradient = self._divergence(hidden, rows)
        torch.autograd.backward(hidden, gradient)

    @torch.no_grad()
    def evaluate(self, rows: Tensor) -> float:
        self.student.eval()
        with self.settings.autocast(self._device):
            hidden = _final_hidden(self.student, self.tokens[rows].to(self._device))
            loss, _ = self._divergence(hidden, rows)
        return loss

    def _divergence(self, hidden: Tensor, rows: Tensor) -> tuple[float, Tensor | None]:
        target = self.targets.read(rows).to(hidden.device)
        flat = hidden.detach().flatten(0, 1).requires_grad_(hidden.requires_grad)
        loss, gradient = divergence(
            lambda states: head_logits(self.student, states), flat, target.flatten(0, 1)
        )
        return loss, gradient if gradient is None else gradient.view_as(hidden)


def divergence(
    logits_of: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor
) -> tuple[float, Tensor | None]:
    """KL(teacher ‖ student), mean over positions, and its gradient at the student's hidden states.

    The gradient at the logits is softmax(student) − softmax(teacher); autograd takes it through the
    head.

    Args:
        logits_of: the head, which maps hidden states [1, P, d] to logits [1, P, V].
        student: final hidden states [T, d].
        teacher: final hidden states [T, d].

    Returns:
        The divergence in nats, and its gradient [T, d], or None if ``student`` requires none.
    """
    wanted = student.requires_grad
    gradient = torch.empty_like(student) if wanted else None
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for start in range(0, len(student), _SLICE):
        part = student[start : start + _SLICE].detach()[None].requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            logits = logits_of(part)
        with torch.no_grad():
            target = logits_of(teacher[start : start + _SLICE].to(part.dtype)[None])
            total += _compare(logits.detach()[0], target[0], len(student))
        if gradient is not None:
            (slope,) = torch.autograd.grad(logits, part, target)
            gradient[start : start + _SLICE] = slope[0]
    return float(total) / len(student), gradient


def _compare(student: Tensor, teacher: Tensor, positions: int) -> Tensor:
    """Sum of the KL divergences of logits [P, V]; overwrites ``teacher`` with the gradient.

    That is the gradient of the mean over ``positions`` at the student's logits. The buffers are
    reused and stay in the processor's cache, because fresh memory costs more than the arithmetic.
    """
    size = _CACHED if student.device.type == "cpu" else _SLICE
    dtype = torch.promote_types(student.dtype, torch.float32)
    buffers = student.new_empty(3, size, student.shape[1], dtype=dtype)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for start in range(0, len(student), size):
        rows = slice(start, min(start + size, len(student)))
        log_q, log_p, p = buffers[:, : rows.stop - start]
        torch.log_softmax(student[rows], -1, dtype=dtype, out=log_q)
        torch.log_softmax(teacher[rows], -1, dtype=dtype, out=log_p)
        torch.exp(log_p, out=p)
        total += log_p.sub_(log_q).mul_(p).sum()
        teacher[rows] = log_q.exp_().sub_(p).div_(positions)
    return total


def _final_hidden(model: Any, tokens: Tensor) -> Tensor:
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden
