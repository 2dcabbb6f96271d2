"""Streaming second moments of a group's inputs.

With x the student's and x_f the teacher's inputs of the same tokens (columns of X and X_f):

* gram  H  = X Xᵀ / T             [n, n], symmetric
* shift Δ  = (X_f − X) Xᵀ / T     [n, n], not symmetric
* teacher gram  X_f X_fᵀ / T      [n, n], symmetric
* teacher magnitude  mean |x_f|   [n]

and with g the gradients of the loss by the group's stacked outputs in the teacher, [m] for a token:

* gradient gram  mean g gᵀ        [m, m], symmetric
* row Fisher  Σ_j mean (∂L/∂W_ij)²  [m], of the loss of a sequence, over its tokens

SAES-SVD, arXiv 2602.03051, Algorithm 1, without its constant factor 2. Products are taken in
float32 per batch and summed over batches in float64.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from svdserve.compression.statistics.linalg import lower_products, mirrored

Statistic = Literal[
    "gram",
    "shift",
    "held_out",
    "teacher_gram",
    "teacher_magnitude",
    "gradient_gram",
    "row_fisher",
]
OF_GRADIENTS: frozenset[Statistic] = frozenset({"gradient_gram", "row_fisher"})
OF_TEACHER: frozenset[Statistic] = OF_GRADIENTS | {"teacher_gram", "teacher_magnitude"}

DESCRIPTIONS: dict[Statistic, str] = {
    "gram": "Gram matrix of the student's inputs",
    "shift": "shift of the teacher's inputs against the student's",
    "held_out": "the first two of sequences that are held out",
    "teacher_gram": "Gram matrix of the teacher's inputs",
    "teacher_magnitude": "mean magnitude of the teacher's inputs",
    "gradient_gram": "Gram matrix of the loss gradients at the teacher's outputs",
    "row_fisher": "Fisher information of the teacher's weights, summed over each row",
}
# Shares of the mean norm of a sequence that a token's gradient is clipped to.
_CLIP = (0.1, 10.0)


@dataclass(frozen=True)
class Statistics:
    """Finished statistics of one group, float64, divided by the number of tokens.

    A field is None where the method did not ask for it. ``held_out`` has the Gram matrix and the
    shift of calibration sequences that are in none of the others.
    """

    tokens: int
    gram: Tensor | None = None
    shift: Tensor | None = None
    held_out: "Statistics | None" = None
    teacher_gram: Tensor | None = None
    teacher_magnitude: Tensor | None = None
    gradient_gram: Tensor | None = None
    row_fisher: Tensor | None = None

    def of_rows(self, rows: slice) -> "Statistics":
        """What belongs to some rows of the stacked weight, such as one linear of the group."""
        gram, fisher = self.gradient_gram, self.row_fisher
        return replace(
            self,
            gradient_gram=None if gram is None else gram[rows, rows],
            row_fisher=None if fisher is None else fisher[rows],
        )


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
        done: dict[str, Any] = {}
        for name, total in self._sums.items():
            if name in ("gram", "teacher_gram"):
                mirrored(total)
            if not bool(total.sum().isfinite()):  # NaN and infinity survive every sum
                raise FloatingPointError(
                    f"{name}: the calibration inputs are not finite, or their squares are not"
                )
            done[name] = total.div_(max(self._tokens, 1))
        return Statistics(self._tokens, **done)


class GradientAccumulator:
    """Sums the gradient statistics of one group of stacked outputs m.

    The norm of a token's gradient is clipped to [0.1, 10] times the mean of its sequence, so that
    a few tokens do not decide the metric (LEMS / KFAC-SVD, ICML 2026).
    """

    def __init__(self, features: int, wanted: frozenset[Statistic], device: torch.device) -> None:
        self._gram = self._fisher = None
        if "gradient_gram" in wanted:
            self._gram = torch.zeros(features, features, device=device)
        if "row_fisher" in wanted:
            self._fisher = torch.zeros(features, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add x [B, L, n] and g [B, L, m] of whole sequences.

        Raises:
            FloatingPointError: a gradient is NaN or infinite.
        """
        if not bool(gradients.sum().isfinite()):
            raise FloatingPointError("the gradients of the loss are not finite")
        for x, g in zip(inputs.float(), gradients.float(), strict=True):
            if self._fisher is not None:
                self._fisher += (g.T @ x).square().sum(dim=1)
            if self._gram is not None:
                norms = g.norm(dim=1, keepdim=True)
                low, high = (share * norms.mean() for share in _CLIP)
                scale = norms.clamp(low, high) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
                _add_gram(self._gram, g * scale)
            self._tokens += x.shape[0]

    def into(self, statistics: Statistics) -> Statistics:
        """``statistics`` with the means over the tokens that were added.

        Raises:
            FloatingPointError: squares of the gradients are beyond float32.
        """
        gram = None if self._gram is None else mirrored(self._gram).div_(self._tokens)
        fisher = None if self._fisher is None else self._fisher.div_(self._tokens)
        if any(t is not None and not bool(t.sum().isfinite()) for t in (gram, fisher)):
            raise FloatingPointError("the squares of the gradients of the loss are not finite")
        return replace(statistics, gradient_gram=gram, row_fisher=fisher)


def _rows(inputs: Tensor | None) -> Tensor | None:
    return None if inputs is None else inputs.reshape(-1, inputs.shape[-1]).float()


def _given(inputs: Tensor | None) -> Tensor:
    assert inputs is not None, "the walk must supply every stream that a statistic reads"
    return inputs


def _add_gram(total: Tensor, x: Tensor) -> None:
    """total += xᵀ x, on and below the diagonal only."""
    for rows, columns, values in lower_products(x.T):
        total[rows, columns] += values
