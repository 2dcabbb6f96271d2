"""Second moments of the gradients at a group's outputs.

Let g [m] be the loss's gradient at the group's stacked outputs in the teacher, for one token:

* gradient Gram matrix  mean g gᵀ     [m, m], symmetric
* row Fisher  Σ_j mean (∂L/∂W_ij)²    [m], where L is the loss of one sequence

Means are over tokens. Both are summed in float32.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from svdserve.compression.statistics.linalg import mirrored
from svdserve.compression.statistics.moments import Batch, Statistic
from svdserve.compression.statistics.of_inputs import add_gram

# Bounds for the norm of a token's gradient, as multiples of the mean norm in its sequence.
_CLIP = (0.1, 10.0)


class _OfGradients(Statistic):
    """A float32 sum over sequences."""

    teacher = gradients = True

    def __init__(self, outputs: int, inputs: int, device: torch.device) -> None:  # noqa: ARG002
        self._total = torch.zeros(self.shape(outputs), device=device)
        self._tokens = 0

    @staticmethod
    @abstractmethod
    def shape(outputs: int) -> tuple[int, ...]: ...

    def add(self, batch: Batch) -> None:
        """Add x [B, L, n] of the teacher and g [B, L, m] of whole sequences."""
        inputs, gradients = batch.teacher, batch.gradients
        assert inputs is not None, "gradients come with the teacher's inputs"
        assert gradients is not None, "the walk must run back what a statistic reads"
        if not bool(gradients.sum().isfinite()):
            raise FloatingPointError("the gradients of the loss are not finite")
        for x, g in zip(inputs.float(), gradients.float(), strict=True):
            self._sum(self._total, x, g)
            self._tokens += x.shape[0]

    @abstractmethod
    def _sum(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        """Add a sequence, x [L, n] and g [L, m], to the total in place."""

    def _whole(self, total: Tensor) -> Tensor:
        """The total, completed by what ``_sum`` does not compute."""
        return total

    def finish(self) -> Tensor:
        mean = self._whole(self._total).div_(self._tokens)
        if not bool(mean.sum().isfinite()):
            raise FloatingPointError("the squares of the gradients of the loss are not finite")
        return mean


class GradientGram(_OfGradients):
    """The mean of g gᵀ, after clipping the norm of every g.

    The norm is clipped to [0.1, 10] times the mean norm of its sequence, so that few tokens do not
    dominate the metric (LEMS / KFAC-SVD, ICML 2026).
    """

    name = "gradient_gram"
    description = "Gram matrix of the loss gradients at the teacher's outputs"

    @staticmethod
    def shape(outputs: int) -> tuple[int, ...]:
        return (outputs, outputs)

    def _sum(self, total: Tensor, x: Tensor, g: Tensor) -> None:  # noqa: ARG002
        norms = g.norm(dim=1, keepdim=True)
        low, high = (share * norms.mean() for share in _CLIP)
        scale = norms.clamp(low, high) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        add_gram(total, g * scale)

    def _whole(self, total: Tensor) -> Tensor:
        return mirrored(total)

    @staticmethod
    def of_rows(value: Any, rows: slice) -> Any:
        return value[rows, rows]


class RowFisher(_OfGradients):
    """The squared gradients of each sequence's loss by the weight, summed over each row."""

    name = "row_fisher"
    description = "Fisher information of the teacher's weights, summed over each row"

    @staticmethod
    def shape(outputs: int) -> tuple[int, ...]:
        return (outputs,)

    def _sum(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        total += (g.T @ x).square().sum(dim=1)

    @staticmethod
    def of_rows(value: Any, rows: slice) -> Any:
        return value[rows]
