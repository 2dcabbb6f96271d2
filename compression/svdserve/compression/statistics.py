"""Streaming second moments of a group's inputs.

With x the student's and x_f the teacher's inputs of the same tokens (columns of X and X_f):

* gram  H  = X Xᵀ / T             [n, n], symmetric
* shift Δ  = (X_f − X) Xᵀ / T     [n, n], not symmetric
* teacher gram  X_f X_fᵀ / T      [n, n], symmetric
* teacher magnitude  mean |x_f|   [n]

SAES-SVD, arXiv 2602.03051, Algorithm 1, without its constant factor 2. Products are taken in
float32 per batch and summed over batches in float64.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Statistic = Literal["gram", "shift", "teacher_gram", "teacher_magnitude"]

DESCRIPTIONS: dict[Statistic, str] = {
    "gram": "Gram matrix of the student's inputs",
    "shift": "shift of the teacher's inputs against the student's",
    "teacher_gram": "Gram matrix of the teacher's inputs",
    "teacher_magnitude": "mean magnitude of the teacher's inputs",
}


@dataclass(frozen=True)
class Statistics:
    """Finished statistics of one group, float64, divided by the number of tokens.

    A field is None where the method did not ask for it.
    """

    tokens: int
    gram: Tensor | None = None
    shift: Tensor | None = None
    teacher_gram: Tensor | None = None
    teacher_magnitude: Tensor | None = None


class Accumulator:
    """Sums the asked statistics over batches; ``add`` takes [..., n] inputs, ``finish`` divides."""

    def __init__(self, features: int, wanted: frozenset[Statistic], device: torch.device) -> None:
        self._sums = {
            name: torch.zeros(
                [features] if name == "teacher_magnitude" else [features, features],
                dtype=torch.float64,
                device=device,
            )
            for name in sorted(wanted)
        }
        self._tokens = 0

    def add(self, student: Tensor | None, teacher: Tensor | None) -> None:
        """Add one batch; a stream that no wanted statistic reads may be None.

        Raises:
            FloatingPointError: an input is NaN or infinite.
        """
        x, x_f = _rows(student), _rows(teacher)
        self._tokens += (x if x is not None else _given(x_f)).shape[0]
        for name, total in self._sums.items():
            if name == "gram":
                _add_gram(total, _given(x))
            elif name == "teacher_gram":
                _add_gram(total, _given(x_f))
            elif name == "teacher_magnitude":
                total += _given(x_f).abs().sum(dim=0)
            elif x is not x_f:
                total += (_given(x_f) - _given(x)).T @ _given(x)

    def finish(self) -> Statistics:
        done: dict[str, Tensor] = {}
        for name, total in self._sums.items():
            if name in ("gram", "teacher_gram"):
                total.tril_()
                total += total.tril(-1).T
            if not bool(total.sum().isfinite()):  # NaN and infinity survive every sum
                raise FloatingPointError(f"{name}: the calibration inputs are not finite")
            done[name] = total.div_(max(self._tokens, 1))
        return Statistics(self._tokens, **done)


def _rows(inputs: Tensor | None) -> Tensor | None:
    return None if inputs is None else inputs.reshape(-1, inputs.shape[-1]).float()


def _given(inputs: Tensor | None) -> Tensor:
    assert inputs is not None, "the walk must supply every stream that a statistic reads"
    return inputs


def _add_gram(total: Tensor, x: Tensor) -> None:
    """total += xᵀ x on and below the diagonal only: panels skip what symmetry gives for free."""
    n = x.shape[1]
    panel = -(-n // max(1, min(6, n // 256)))
    for start in range(0, n, panel):
        total[start:, start : start + panel] += x[:, start:].T @ x[:, start : start + panel]
