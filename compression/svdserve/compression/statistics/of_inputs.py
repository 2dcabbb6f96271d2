"""Second moments of a group's inputs.

Let x be the student's and x_f the teacher's inputs for the same T tokens, as columns of X and X_f:

* Gram matrix  H = X Xᵀ / T                 [n, n], symmetric
* shift  Δ = (X_f − X) Xᵀ / T               [n, n], not symmetric
* teacher's Gram matrix  X_f X_fᵀ / T       [n, n], symmetric
* teacher's magnitude  mean |x_f|           [n]

H and Δ are those of SAES-SVD (arXiv 2602.03051, Algorithm 1) without its constant factor 2. The
products of a batch are computed in float32, and summed over batches in float64.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from svdserve.compression.statistics.linalg import lower_products, mirrored
from svdserve.compression.statistics.moments import Batch, Statistic, Statistics


class _OfInputs(Statistic):
    """A float64 sum over tokens."""

    def __init__(self, outputs: int, inputs: int, device: torch.device) -> None:  # noqa: ARG002
        shape = self.shape(inputs)
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._tokens = 0

    @staticmethod
    def shape(inputs: int) -> tuple[int, ...]:
        return (inputs, inputs)

    def add(self, batch: Batch) -> None:
        self._tokens += batch.tokens
        self._sum(self._total, batch)

    @abstractmethod
    def _sum(self, total: Tensor, batch: Batch) -> None:
        """Add a batch to the total, in place."""

    def _whole(self, total: Tensor) -> Tensor:
        """The total, completed by what ``_sum`` does not compute."""
        return total

    def finish(self) -> Tensor:
        total = self._whole(self._total)
        if not bool(total.sum().isfinite()):  # NaN and infinity survive every sum
            raise FloatingPointError(
                f"{self.name}: the calibration inputs are not finite, or their squares are not"
            )
        return total.div_(max(self._tokens, 1))


class _OfOneStream(_OfInputs):
    """The Gram matrix of the inputs in the stream that a subclass reads."""

    def _sum(self, total: Tensor, batch: Batch) -> None:
        add_gram(total, _rows(batch.student if self.student else batch.teacher))

    def _whole(self, total: Tensor) -> Tensor:
        return mirrored(total)


class Gram(_OfOneStream):
    """H = X Xᵀ / T."""

    name = "gram"
    description = "Gram matrix of the student's inputs"
    student = True


class Shift(_OfInputs):
    """Δ = (X_f − X) Xᵀ / T."""

    name = "shift"
    description = "shift of the teacher's inputs against the student's"
    student = teacher = True

    def _sum(self, total: Tensor, batch: Batch) -> None:
        x, x_f = _rows(batch.student), _rows(batch.teacher)
        total += (x_f - x).T @ x


class TeacherGram(_OfOneStream):
    """X_f X_fᵀ / T."""

    name = "teacher_gram"
    description = "Gram matrix of the teacher's inputs"
    teacher = True


class TeacherMagnitude(_OfInputs):
    """The mean of |x_f| for every channel."""

    name = "teacher_magnitude"
    description = "mean magnitude of the teacher's inputs"
    teacher = True

    @staticmethod
    def shape(inputs: int) -> tuple[int, ...]:
        return (inputs,)

    def _sum(self, total: Tensor, batch: Batch) -> None:
        total += _rows(batch.teacher).abs().sum(dim=0)


class HeldOut(Statistic):
    """H and Δ of held-out sequences, which no other statistic reads, for choices such as β."""

    name = "held_out"
    description = (
        "the student's Gram matrix and the shift once more, of calibration sequences that are kept "
        "apart"
    )
    student = teacher = held_out = True

    def __init__(self, outputs: int, inputs: int, device: torch.device) -> None:
        self._gram, self._shift = (kind(outputs, inputs, device) for kind in (Gram, Shift))
        self._tokens = 0

    def add(self, batch: Batch) -> None:
        self._tokens += batch.tokens
        self._gram.add(batch)
        self._shift.add(batch)

    def finish(self) -> Statistics | None:
        """The statistics; None if there were too few sequences to hold any out."""
        if not self._tokens:
            return None
        return Statistics(self._tokens, gram=self._gram.finish(), shift=self._shift.finish())


def _rows(inputs: Tensor | None) -> Tensor:
    assert inputs is not None, "the walk must supply every stream that a statistic reads"
    return inputs.reshape(-1, inputs.shape[-1]).float()


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add xᵀ x [n, n] to the total on and below the diagonal, for x [T, n]."""
    for rows, columns, values in lower_products(x.T):
        total[rows, columns] += values
