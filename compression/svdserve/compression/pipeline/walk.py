"""The two-stream walk: teacher and student, block by block, one block in memory.

Both streams hold the hidden states of all calibration tokens at the same block boundary. Inside a
block they advance group by group (block_pass.py), so that the statistics of a group are taken after
all earlier groups of the same block are already replaced in the student.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from svdserve.compression.model.architecture import Call, Group
from svdserve.compression.model.containers import Container, learn_containers
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.block_pass import BlockPass
from svdserve.compression.pipeline.measure import Measured, measured_rows
from svdserve.compression.pipeline.streams import Streams
from svdserve.compression.statistics.gradients import BoundaryGradients
from svdserve.compression.statistics.moments import STATISTICS, of_gradients
from svdserve.compression.system.machine import Precision


class Walk:
    """Carries both streams through the blocks of a model.

    Args:
        skeleton: the model.
        tokens: [N, L] token ids.
        wanted: names of the statistics that the method needs; they say which streams run.
        dtype: of the stored streams (computation is in float32).
        device: where blocks run.
        batch_size: sequences per forward step.
        offload: folder for the streams, or None for memory.
        gradients: at the block boundaries, where ``wanted`` has a statistic of gradients.
        precision: of the blocks' forward passes.
        both: run both streams whatever is wanted.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        wanted: frozenset[str],
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int = 1,
        offload: Path | None = None,
        gradients: BoundaryGradients | None = None,
        *,
        precision: Precision = "float32",
        both: bool = False,
    ) -> None:
        self.skeleton, self.device, self.gradients = skeleton, device, gradients
        self.precision = precision
        self.wanted_of_gradients = of_gradients(wanted)
        self.wanted = wanted - self.wanted_of_gradients
        self.uses_student = both or any(STATISTICS[name].student for name in wanted)
        self.uses_teacher = both or any(STATISTICS[name].teacher for name in wanted)
        self.runs = self.uses_student or self.uses_teacher
        self.streams = Streams((tokens.shape[0], tokens.shape[1]), dtype, device, offload)
        starts = range(0, tokens.shape[0], batch_size)
        self.batches = [slice(s, min(s + batch_size, tokens.shape[0])) for s in starts]
        # Every eighth batch, and so a part of every source of calibration text.
        self.held_out = self.batches[7::8] or self.batches[1:][-1:]
        measures = self.uses_student and self.uses_teacher
        self._measured_rows = measured_rows(*tokens.shape) if measures else []
        self._measured = Measured(device)
        self._calls: dict[int, list[Call]] = {}
        self.containers: list[Mapping[Group, Container]] = []
        """Of every block, by the groups that close them; none where no stream runs."""
        if self.runs:
            self._embed(tokens)

    def _embed(self, tokens: Tensor) -> None:
        embedded = self.skeleton.embed([tokens[rows] for rows in self.batches], self.device)
        for rows, (hidden, calls) in zip(self.batches, embedded, strict=True):
            # Masks and positions depend on the shape of the batch alone.
            self._calls.setdefault(rows.stop - rows.start, calls)
            if self.uses_teacher:
                self.streams.write("teacher", rows, hidden)
            if self.uses_student:
                self.streams.write("student", rows, hidden)
            for row in self._measured_rows:
                if rows.start <= row < rows.stop:
                    self._measured.add(hidden[row - rows.start][None])
            shape = hidden.shape
        calls = self._calls[shape[0]]
        self.containers = [
            learn_containers(block, groups, call, shape, self.skeleton.block_name(index))
            for index, (block, groups, call) in enumerate(
                zip(self.skeleton.layers, self.skeleton.groups, calls, strict=True)
            )
        ]

    def error(self) -> float | None:
        """The error of the hidden states where the streams are (measure.py).

        None where only one stream runs, or none.
        """
        return self._measured.error() if self._measured_rows else None

    def measure(self, block: int, teacher: nn.Module, student: nn.Module) -> None:
        """Carry the sequences that ``error`` is measured on over a block."""
        if self._measured_rows:
            blocks = {"teacher": teacher, "student": student}
            self._measured.advance(blocks, self.call(block, 1))

    def call(self, block: int, sequences: int) -> Call:
        """The arguments besides the hidden states with which the decoder calls a block."""
        if sequences not in self._calls:
            tokens = torch.zeros(sequences, self.streams.length, dtype=torch.int64)
            ((_, self._calls[sequences]),) = self.skeleton.embed([tokens], self.device)
        return self._calls[sequences][block]

    def block(self, index: int) -> BlockPass:
        """Load block ``index`` and prepare to replace its groups in order."""
        return BlockPass(self, index)
