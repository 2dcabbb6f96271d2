"""Statistics of one group, summed over the calibration tokens.

A statistic is a class: it says which streams it needs, adds batches and finishes (of_inputs.py and
of_gradients.py hold one each for the inputs and for the gradients of a group). A method names those
that it wants, and the walk asks them what must run.
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

    Those of inputs are float64, those of gradients float32. A field is None where the method did
    not ask for it. The names of the fields are those of the classes.
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
        values = {name: getattr(self, name) for name in STATISTICS}
        cut = {n: STATISTICS[n].of_rows(v, rows) for n, v in values.items() if v is not None}
        return replace(self, **cut)


@dataclass(frozen=True)
class Batch:
    """What passed through the linears of a group; None where that did not run.

    Args:
        student, teacher: the inputs x of the group in either stream, [..., n].
        gradients: of the loss by the group's stacked outputs in the teacher, [B, L, m].
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
    """One statistic of one group, while it is summed.

    Args:
        outputs: m of the group's stacked weight [m, n].
        inputs: n.
        device: where the sums are.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    student: ClassVar[bool] = False
    """Whether it reads the student's inputs."""
    teacher: ClassVar[bool] = False
    """Whether it reads the teacher's inputs."""
    gradients: ClassVar[bool] = False
    """Whether it reads gradients, which are taken by running the teacher's block backward."""
    held_out: ClassVar[bool] = False
    """Whether it is of the held-out sequences: where one is wanted, no other statistic has them."""

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
            FloatingPointError: a value is NaN or infinite; ``finish`` may say so instead.
        """

    @abstractmethod
    def finish(self) -> Any:
        """The mean over the tokens that were added; the object is of no use any more.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """

    @staticmethod
    def of_rows(value: Any, rows: slice) -> Any:  # noqa: ARG004
        """What of a finished value belongs to some rows of the stacked weight."""
        return value


STATISTICS: dict[str, type[Statistic]] = {}
"""Every statistic by its name."""


def needing_gradients(names: Collection[str]) -> frozenset[str]:
    """Those of some statistics that need gradients."""
    return frozenset(name for name in names if STATISTICS[name].gradients)


def without_gradients(names: Collection[str]) -> frozenset[str]:
    """Those of some statistics that need none."""
    return frozenset(name for name in names if not STATISTICS[name].gradients)


def of_teacher_alone(names: Collection[str]) -> bool:
    """Whether some statistics are the same for every student."""
    return not any(STATISTICS[name].student for name in names)


class Sums:
    """Several statistics of one group, while they are summed.

    Args:
        names: which.
        outputs, inputs: m and n of the group's stacked weight [m, n].
        device: where the sums are.
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
            batch: what passed through the linears.
            held_out: it is for the statistics of held-out sequences, if there are any here.

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
        """The means.

        Raises:
            FloatingPointError: as ``Statistic.finish``.
        """
        return self.into(Statistics(self._tokens))

    def into(self, statistics: Statistics) -> Statistics:
        """``statistics`` with these beside it; otherwise as ``finish``."""
        return replace(statistics, **{s.name: s.finish() for s in self._sums})
