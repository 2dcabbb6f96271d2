"""One block of the two-stream walk, on its way from dense to factored.

The block's own forward is run for each group, stopped at the group, with the containers that are
closed already (attention, MLP) replayed from their stored outputs: attention and every linear are
computed once for each stream. Only norms, residual additions and the student's linears between the
opening and the closing of the last container are repeated, and what the error is measured on
(measure.py). Where no student runs there is nothing to wait for, and the teacher's block runs once
for all its groups.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdserve.compression.format.factors import Factors
from svdserve.compression.format.schema import ModuleSpec
from svdserve.compression.model.architecture import Group
from svdserve.compression.model.containers import Container, input_of, inputs_of
from svdserve.compression.model.modules import replace_group
from svdserve.compression.statistics.gradients import back_through
from svdserve.compression.statistics.moments import Batch, Statistics, Sums
from svdserve.compression.system.machine import forward_precision

if TYPE_CHECKING:
    from svdserve.compression.pipeline.walk import Walk


class BlockPass:
    """One block on its way from dense to factored.

    Use: for every group in ``groups``, ``statistics`` then (optionally) ``replace``; at the end
    ``finish``.
    """

    def __init__(self, walk: "Walk", index: int) -> None:
        self.walk, self.index = walk, index
        self.groups = walk.skeleton.groups[index]
        self.teacher = walk.skeleton.block(index, walk.device)
        self.student = _share_copy(self.teacher)
        self._of_gradients: dict[Group, Sums] = {}
        self._of_teacher: dict[Group, Sums] = {}

    def weight(self, group: Group, member: str) -> Tensor:
        """The teacher's weight [m, n] of one linear, float32."""
        weight = group.linear(self.teacher, member).weight
        assert isinstance(weight, Tensor)
        return weight

    def statistics(self, group: Group, *, collect: bool = True) -> Statistics:
        """Advance both streams to the inputs of ``group`` and sum their statistics.

        With ``collect`` off (a resumed block whose factors are known) the streams only advance.
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
        """One step of the student's stream, and of the teacher's where it runs."""
        sums = self._sums(group, wanted)
        for rows in self.walk.batches:
            with self._forward():
                batch = self._inputs(group, rows)
            sums.add(batch, held_out=rows in self.walk.held_out)
        if (before := self._before(group)) is not None:
            self.walk.streams.drop(_entering("student", before))
        return sums.finish()

    def _teacher_sums(self, wanted: frozenset[str]) -> dict[Group, Sums]:
        """Carry the teacher's stream over the block, where no student runs, and sum on the way."""
        sums = {group: self._sums(group, wanted) for group in self.groups}
        for rows in self.walk.batches if self.walk.runs else ():
            with ExitStack() as stack, self._forward():
                seen = {
                    group: stack.enter_context(inputs_of(_first(self.teacher, group)))
                    for group in sums
                }
                output = self._run(self.teacher, "teacher", rows, {})
            self.walk.streams.write("teacher", rows, output)
            for group, inputs in seen.items():
                sums[group].add(Batch(teacher=inputs.pop()))
        return sums

    def _gradient_sums(self) -> dict[Group, Sums]:
        """Run the teacher's block back from its boundary gradients, before its stream moves on."""
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

    def replace(self, group: Group, name: str, spec: ModuleSpec, factors: Factors) -> None:
        """Put factors into the student; they act from the next group on."""
        parent = self.student.get_submodule(group.parent)
        # Stored precision first: the student must see what will be served.
        spec, factors = spec.model_copy(update={"weights": "float"}), factors.to(torch.float32)
        replace_group(parent, name, spec, factors, torch.float32, self.walk.device)
        parent.requires_grad_(False)

    def replace_weight(self, group: Group, member: str, weight: Tensor) -> None:
        """Give one linear of the student another dense weight [m, n], float32."""
        linear = group.linear(self.student, member)
        linear.weight = nn.Parameter(weight.to(self.walk.device), requires_grad=False)

    def outputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [B, L, d] of both blocks for the sequences ``rows`` [B], after the last group.

        The student's is computed from its stream, with gradients; the teacher's stream is there.
        """
        student = self._run(self.student, "student", rows, {})
        return student, self.walk.streams.read("teacher", rows)

    def finish(self, *, refined: bool = False) -> None:
        """Carry the student's stream over the block (the teacher's is there already).

        ``refined``: factors have changed since the statistics, so nothing stored is used.
        """
        if self.walk.uses_student:
            self._finish_student(refined=refined)
        self.walk.measure(self.index, self.teacher, self.student)

    def _finish_student(self, *, refined: bool) -> None:
        streams = self.walk.streams
        stored = [group for group in self.groups[:-1] if group in self._containers]
        for rows in self.walk.batches:
            with self._forward():
                # The last container is run again, as the widest activations, those at its closing
                # linear, would be the largest stream.
                replay = self._outputs("student", [] if refined else stored, rows)
                streams.write("student", rows, self._run(self.student, "student", rows, replay))
        for stream in ("teacher", "student"):
            streams.drop(*(_leaving(stream, group) for group in stored))

    # The way to a group. What a later step needs is stored on the way.

    def _inputs(self, group: Group, rows: slice) -> Batch:
        """The inputs of a group for a batch; the teacher's None where its stream does not run.

        Containers are stored as they close, but for the last one: behind it the block is run to
        its end.
        """
        streams, last = self.walk.streams, group == self.groups[-1]
        closes = group in self._containers and not last
        replay = self._student_outputs(group, rows)
        student = self._input(self.student, "student", rows, group, replay)
        if closes:
            streams.write(_entering("student", group), rows, student)
        if not self.walk.uses_teacher:
            return Batch(student)
        replay = self._outputs("teacher", self._closed(group), rows)
        if last:
            with inputs_of(_first(self.teacher, group)) as seen:
                streams.write("teacher", rows, self._run(self.teacher, "teacher", rows, replay))
            return Batch(student, seen[0])
        teacher = self._input(self.teacher, "teacher", rows, group, replay)
        if closes:
            output = self._closing(self.teacher, group)(teacher)
            streams.write(_leaving("teacher", group), rows, output)
        return Batch(student, teacher)

    def _student_outputs(self, group: Group, rows: slice) -> dict[Group, Tensor]:
        """The student's outputs of the containers that are closed before a group.

        That of the group just before this one is computed here, since it is replaced by now.
        """
        streams, before = self.walk.streams, self._before(group)
        closed = self._closed(group)
        if before not in closed:
            return self._outputs("student", closed, rows)
        output = self._closing(self.student, before)(
            streams.read(_entering("student", before), rows)
        )
        streams.write(_leaving("student", before), rows, output)
        return self._outputs("student", closed[:-1], rows) | {before: output}

    def _outputs(self, stream: str, closed: list[Group], rows: slice) -> dict[Group, Tensor]:
        """What containers have returned, by the groups that close them."""
        return {g: self.walk.streams.read(_leaving(stream, g), rows) for g in closed}

    def _before(self, group: Group) -> Group | None:
        place = self.groups.index(group)
        return self.groups[place - 1] if place else None

    def _closed(self, group: Group) -> list[Group]:
        """The groups before this one that close a container."""
        before = self.groups[: self.groups.index(group)]
        return [other for other in before if other in self._containers]

    @property
    def _containers(self) -> Mapping[Group, Container]:
        return self.walk.containers[self.index]

    def _closing(self, block: nn.Module, group: Group) -> nn.Module:
        """The linear whose output is that of the container that a group closes."""
        return block.get_submodule(self._containers[group].closing)

    def _forward(self) -> AbstractContextManager[None]:
        return forward_precision(self.walk.precision, self.walk.device)

    def _input(
        self,
        block: nn.Module,
        stream: str,
        rows: slice,
        group: Group,
        replay: Mapping[Group, Tensor],
    ) -> Tensor:
        """Run ``block`` up to the first linear of ``group`` and return that linear's input."""
        return input_of(_first(block, group), lambda: self._run(block, stream, rows, replay))

    def _run(
        self,
        block: nn.Module,
        stream: str,
        rows: slice | Tensor,
        replay: Mapping[Group, Tensor],
    ) -> Tensor:
        """Run ``block`` on a stream's rows with the containers of ``replay`` left out."""
        hidden = self.walk.streams.read(stream, rows)
        args, kwargs = self.walk.call(self.index, len(hidden))
        with ExitStack() as stack:
            for closing, value in replay.items():
                stack.enter_context(self._containers[closing].replayed(block, value))
            output = block(hidden, *args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result


def _entering(stream: str, group: Group) -> str:
    """Name of the stream of what goes into the closing linear of a container."""
    return f"{stream}-into-{group.path}"


def _leaving(stream: str, group: Group) -> str:
    """Name of the stream of what comes out of the closing linear of a container."""
    return f"{stream}-from-{group.path}"


def _first(block: nn.Module, group: Group) -> nn.Module:
    """The first linear of a group, dense or factored."""
    return group.linear(block, group.members[0])


def _share_copy(block: nn.Module) -> nn.Module:
    """A copy of the module tree over the same parameter tensors."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in block.parameters()}
    return copy.deepcopy(block, shared)
