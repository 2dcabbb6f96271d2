"""The two-stream walk: teacher and student, block by block, with one block in memory.

Both streams hold the hidden states of all calibration tokens at the same block boundary. Inside a
block they advance group by group (passage.py), so that the statistics of a group are collected
after all earlier groups of the block are replaced in the student. If no student runs, the teacher's
block runs once for all its groups.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdserve.compression.format.codecs import FLOAT, Codec
from svdserve.compression.format.schema import LinearSpec, ModuleSpec
from svdserve.compression.format.stored import StoredFactors
from svdserve.compression.model.architecture import Call, Group
from svdserve.compression.model.containers import Container, learn_containers
from svdserve.compression.model.modules import (
    EncodedLinear,
    FactoredWeight,
    replace_group,
    served_codec,
)
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.walk.measure import Measured, measured_rows
from svdserve.compression.pipeline.walk.passage import Passage
from svdserve.compression.pipeline.walk.streams import Streams
from svdserve.compression.statistics.gradients import BoundaryGradients, back_through
from svdserve.compression.statistics.moments import (
    STATISTICS,
    Batch,
    Statistics,
    Sums,
    needing_gradients,
    without_gradients,
)
from svdserve.compression.system.precision import Precision, forward_precision


class Walk:
    """Carries both streams through the blocks of a model.

    Args:
        skeleton: the dense model.
        tokens: token ids [N, L].
        wanted: names of the statistics that the method needs; they determine which streams run.
        dtype: the dtype of the stored streams.
        device: the device that runs blocks.
        batch_size: number of sequences in a forward step.
        offload: the folder for the streams; None keeps them in memory.
        gradients: gradients at the block boundaries, if ``wanted`` has a statistic of gradients.
        precision: the precision of the blocks' forward passes.
        both: run both streams even if ``wanted`` does not need them.
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
        self.wanted = without_gradients(wanted)
        self.wanted_of_gradients = needing_gradients(wanted)
        self.uses_student = both or any(STATISTICS[name].student for name in wanted)
        self.uses_teacher = both or any(STATISTICS[name].teacher for name in wanted)
        self.runs = self.uses_student or self.uses_teacher
        self.streams = Streams((tokens.shape[0], tokens.shape[1]), dtype, device, offload)
        starts = range(0, tokens.shape[0], batch_size)
        self.batches = [slice(s, min(s + batch_size, tokens.shape[0])) for s in starts]
        # Every eighth batch, so that each source of calibration text has held-out sequences.
        self.held_out = self.batches[7::8] or self.batches[1:][-1:]
        measures = self.uses_student and self.uses_teacher
        self._measured_rows = measured_rows(*tokens.shape) if measures else []
        self._measured = Measured(device)
        self._calls: dict[int, list[Call]] = {}
        self.containers: list[Mapping[Group, Container]] = []
        """The containers of every block, by the groups that close them; empty if no stream runs."""
        if self.runs:
            self._embed(tokens)

    def _embed(self, tokens: Tensor) -> None:
        embedded = self.skeleton.embed([tokens[rows] for rows in self.batches], self.device)
        for rows, (hidden, calls) in zip(self.batches, embedded, strict=True):
            # Masks and positions depend only on the shape of the batch.
            self._calls.setdefault(rows.stop - rows.start, calls)
            if self.uses_teacher:
                self.streams.write("teacher", rows, hidden)
            if self.uses_student:
                self.streams.write("student", rows, hidden)
            for row in self._measured_rows:
                if rows.start <= row < rows.stop:
                    self._measured.add(hidden[row - rows.start][None])
        traced = zip(self.skeleton.traces, self.skeleton.groups, strict=True)
        self.containers = [learn_containers(trace, groups) for trace, groups in traced]

    def error(self) -> float | None:
        """The student's error at the streams' block boundary (measure.py).

        None if only one stream runs, or none.
        """
        return self._measured.error() if self._measured_rows else None

    def measure(self, block: int, teacher: nn.Module, student: nn.Module) -> None:
        """Carry the sequences on which ``error`` is measured over a block."""
        if self._measured_rows:
            blocks = {"teacher": teacher, "student": student}
            self._measured.advance(blocks, self.call(block, 1))

    def call(self, block: int, sequences: int) -> Call:
        """The arguments of a block besides the hidden states, for a number of sequences."""
        if sequences not in self._calls:
            tokens = torch.zeros(sequences, self.streams.length, dtype=torch.int64)
            ((_, self._calls[sequences]),) = self.skeleton.embed([tokens], self.device)
        return self._calls[sequences][block]

    def block(self, index: int) -> "BlockPass":
        """Load block ``index`` and prepare to replace its groups in order."""
        return BlockPass(self, index)


class BlockPass:
    """One block while its groups are replaced.

    For every group in ``groups``, call ``statistics`` and then, optionally, ``replace``; at the end
    call ``finish``.
    """

    def __init__(self, walk: Walk, index: int) -> None:
        self.walk, self.index = walk, index
        self.groups = walk.skeleton.groups[index]
        self.teacher = walk.skeleton.block(index, walk.device)
        self.student = _share_copy(self.teacher)
        self._passage = Passage(
            {"teacher": self.teacher, "student": self.student},
            self.groups,
            walk.containers[index] if walk.runs else {},
            walk.streams,
            partial(walk.call, index),
        )
        self._of_gradients: dict[Group, Sums] = {}
        self._of_teacher: dict[Group, Sums] = {}

    def weight(self, group: Group, member: str) -> Tensor:
        """The teacher's weight [m, n] of one linear, float32."""
        weight = group.linear(self.teacher, member).weight
        assert isinstance(weight, Tensor)
        return weight

    def statistics(self, group: Group, *, collect: bool = True) -> Statistics:
        """Advance both streams to the inputs of ``group`` and sum its statistics.

        If ``collect`` is False (for a resumed block, whose factors are known), the streams advance
        without statistics.
        """
        wanted = self.walk.wanted if collect else frozenset()
        if collect and self.walk.wanted_of_gradients and not self._of_gradients:
            self._of_gradients = self._gradient_sums()
        if self.walk.uses_student:
            statistics = self._along_student(group, wanted)
        else:
            self._of_teacher = self._of_teacher or self._teacher_sums(wanted)
            statistics = self._of_teacher.pop(group).finish()
        if collect and self.walk.wanted_of_gradients:
            return self._of_gradients.pop(group).into(statistics)
        return statistics

    def _sums(self, group: Group, wanted: frozenset[str]) -> Sums:
        shapes = [self.weight(group, member).shape for member in group.members]
        return Sums(wanted, sum(m for m, _ in shapes), shapes[0][1], self.walk.device)

    def _along_student(self, group: Group, wanted: frozenset[str]) -> Statistics:
        """Advance the student's stream, and the teacher's if it runs, to a group."""
        sums = self._sums(group, wanted)
        for rows in self.walk.batches:
            with self._forward():
                batch = self._passage.inputs(group, rows, teacher=self.walk.uses_teacher)
            sums.add(batch, held_out=rows in self.walk.held_out)
        self._passage.leave(group)
        return sums.finish()

    def _teacher_sums(self, wanted: frozenset[str]) -> dict[Group, Sums]:
        """Carry the teacher's stream over the block and sum statistics, if no student runs."""
        sums = {group: self._sums(group, wanted) for group in self.groups}
        for rows in self.walk.batches if self.walk.runs else ():
            with self._forward():
                inputs = self._passage.teacher_inputs(rows)
            for group in self.groups:
                sums[group].add(Batch(teacher=inputs.pop(group)))
        return sums

    def _gradient_sums(self) -> dict[Group, Sums]:
        """Sums from a backward run of the teacher's block, before the teacher's stream advances."""
        walk = self.walk
        assert walk.gradients is not None, "whoever wants gradients must have swept them"
        wanted = walk.wanted_of_gradients
        sums = {group: self._sums(group, wanted) for group in self.groups}
        gradients = walk.gradients.read(self.index)
        for row, gradient in zip(walk.gradients.rows, gradients, strict=True):
            rows = slice(row, row + 1)
            hidden = walk.streams.read("teacher", rows)
            call = walk.call(self.index, 1)
            upper = gradient[None].to(hidden)
            flows, _ = back_through(self.teacher, self.groups, hidden, call, upper)
            for group in self.groups:
                flow = flows[group.path]
                sums[group].add(Batch(teacher=flow.inputs, gradients=flow.gradients))
        return sums

    def replace(self, group: Group, name: str, spec: ModuleSpec, factors: StoredFactors) -> None:
        """Put factors into the student; they take effect from the next group on."""
        parent = self.student.get_submodule(group.parent)
        # Decoded from their stored form, because the student must see what will be served.
        spec = spec.model_copy(update={"codec": FLOAT.name})
        decoded = StoredFactors(factors.layout, FLOAT, factors.decoded(torch.float32))
        replace_group(parent, name, spec, decoded, torch.float32, self.walk.device)
        module = parent.get_submodule(name)
        assert isinstance(module, FactoredWeight)
        module.imitated = served_codec(factors.codec, factors.layout)
        parent.requires_grad_(False)

    def replace_weight(self, group: Group, member: str, weight: Tensor, codec: Codec) -> None:
        """Replace the dense weight [m, n] of one linear of the student.

        Args:
            weight: decoded, in float32.
            codec: the codec that it is stored by.
        """
        parent, device = self.student.get_submodule(group.parent), str(self.walk.device)
        old = group.linear(self.student, member)
        assert isinstance(old, nn.Linear)
        m, n = weight.shape
        linear = EncodedLinear(n, m, LinearSpec(role=group.role), old.bias, torch.float32, device)
        linear.weight = nn.Parameter(weight.to(self.walk.device))
        linear.imitated = served_codec(codec)
        setattr(parent, member, linear.requires_grad_(False))

    def outputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [B, L, d] of student and teacher for the sequences ``rows`` [B].

        Call this after the last group. The student's output is computed from its stream, with
        gradients; the teacher's stream already holds the teacher's output.
        """
        student = self._passage.run("student", rows, {})
        return student, self.walk.streams.read("teacher", rows)

    def finish(self, *, refined: bool = False) -> None:
        """Carry the student's stream over the block; the teacher's is behind it already.

        If ``refined`` is True, factors have changed since, and no stored output is replayed.
        """
        if self.walk.uses_student:
            for rows in self.walk.batches:
                with self._forward():
                    self._passage.finish(rows, refined=refined)
            self._passage.drop()
        self.walk.measure(self.index, self.teacher, self.student)

    def _forward(self) -> AbstractContextManager[None]:
        return forward_precision(self.walk.precision, self.walk.device)


def _share_copy(block: nn.Module) -> nn.Module:
    """A copy of a block's modules that shares the parameter tensors."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in block.parameters()}
    return copy.deepcopy(block, shared)
