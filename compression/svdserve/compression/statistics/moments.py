"""Statistics of one group, summed over the calibration tokens.

Each statistic is a class that declares which streams it reads, adds batches, and returns the
result (see of_inputs.py and of_gradients.py). A method names the statistics that it needs, and
their declarations tell the walk which streams to run.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """The finished statistics of one group, divided by the number of tokens.

    Statistics of inputs are float64, and statistics of gradients are float32. A field is None if
    the method does not need it. Each field is named like its class's ``name``.
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
        """The statistics for some rows of the stacked weight, such as one linear of the group."""
        values = {name: getattr(self, name) for name in STATISTICS}
        cut = {n: STATISTICS[n].of_rows(v, rows) for n, v in values.items() if v is not None}
        return replace(self, **cut)


@dataclass(frozen=True)
class Batch:
    """The inputs and gradients of a group for some tokens; None for a stream that did not run.

    Args:
        student, teacher: the group's inputs x [..., n] in the student and in the teacher.
        gradients: the loss's gradients [B, L, m] at the group's stacked outputs in the teacher.
    """

    student: Tensor | None = None
    teacher: Tensor | None = None
    gradients: Tensor | None = None

    @property
    def tokens(self) -> int:
        inputs = self.student if self.student is not None else self.teacher
        assert inputs is not None
        return inputs.numel() // inputs.shape[-1]


class Statistic(ABC):
    """The running sum of one statistic of one group.

    Args:
        outputs, inputs: m and n of the group's stacked weight [m, n].
        device: the device of the sums.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    student: ClassVar[bool] = False
    """Whether it reads the student's inputs."""
    teacher: ClassVar[bool] = False
    """Whether it reads the teacher's inputs."""
    gradients: ClassVar[bool] = False
    """Whether it reads gradients, for which the teacher's block runs backward."""
    held_out: ClassVar[bool] = False
    """Whether it reads the held-out sequences, which all other statistics then skip."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            STATISTICS[cls.name] = cls

    @abstractmethod
    def __init__(self, outputs: int, inputs: int, device: torch.device) -> None: ...

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Add one batch.

        Raises:
            FloatingPointError: a value is NaN or infinite; ``finish`` may raise this instead.
        """

    @abstractmethod
    def finish(self) -> Any:
        """The mean over all added tokens; the object must not be used afterwards.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """

    @staticmethod
    def of_rows(value: Any, rows: slice) -> Any:  # noqa: ARG004
        """The share of a finished value that belongs to some rows of the stacked weight."""
        return value


STATISTICS: dict[str, type[Statistic]] = {}
"""All statistics by name."""


def needing_gradients(names: Collection[str]) -> frozenset[str]:
    """The names of the given statistics that read gradients."""
    return frozenset(name for name in names if STATISTICS[name].gradients)


def without_gradients(names: Collection[str]) -> frozenset[str]:
    """The names of the given statistics that read no gradients."""
    return frozenset(name for name in names if not STATISTICS[name].gradients)


def of_teacher_alone(names: Collection[str]) -> bool:
    """Whether none of the given statistics reads the student's inputs."""
    return not any(STATISTICS[name].student for name in names)


class Sums:
    """The running sums of several statistics of one group.

    Args:
        names: the names of the statistics.
        outputs, inputs: m and n of the group's stacked weight [m, n].
        device: the device of the sums.
    """

    def __init__(
        self, names: Collection[str], outputs: int, inputs: int, device: torch.device
    ) -> None:
        self._sums = [STATISTICS[name](outputs, inputs, device) for name in sorted(names)]
        self._parted = any(statistic.held_out for statistic in self._sums)
        self._tokens = 0

    def add(self, batch: Batch, *, held_out: bool = False) -> None:
        """Add one batch; a stream that no statistic reads may be None.

        Args:
            batch: inputs and gradients of the group.
            held_out: whether the batch is held out. It then goes only to statistics of held-out
                sequences, if ``names`` has any.

        Raises:
            FloatingPointError: as ``Statistic.add``.
        """
        held_out = held_out and self._parted
        if not held_out:
            self._tokens += batch.tokens
        for statistic in self._sums:
            if statistic.held_out == held_out:
                statistic.add(batch)

    def finish(self) -> Statistics:
        """The finished statistics.

        Raises:
            FloatingPointError: as ``Statistic.finish``.
        """
        return self.into(Statistics(self._tokens))

    def into(self, statistics: Statistics) -> Statistics:
        """A copy of ``statistics`` with these statistics added; raises as ``finish`` does."""
        return replace(statistics, **{s.name: s.finish() for s in self._sums})
