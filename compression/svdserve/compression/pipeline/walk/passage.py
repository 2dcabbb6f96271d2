"""Running the two copies of a block group by group.

For each group the block's own forward runs and stops at the group. Earlier containers (attention,
MLP) are replayed with their stored outputs, so that each stream computes attention and every linear
once. Only norms, residual additions and the student's linears in the last container are repeated.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from svdserve.compression.model.architecture import Call, Group
from svdserve.compression.model.containers import Container, input_of, inputs_of
from svdserve.compression.pipeline.walk.streams import Streams
from svdserve.compression.statistics.moments import Batch


class Passage:
    """Runs the teacher's and the student's copy of a block on their streams.

    Args:
        blocks: the two copies by the names of their streams, ``teacher`` and ``student``.
        groups: the groups of the block, in the order of their calls.
        containers: the containers by the groups that close them.
        streams: the hidden states at the block's input, which those at its output replace.
        call: gives the other arguments of the block for a number of sequences.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        groups: tuple[Group, ...],
        containers: Mapping[Group, Container],
        streams: Streams,
        call: Callable[[int], Call],
    ) -> None:
        self._blocks, self._groups, self._containers = blocks, groups, containers
        self._streams, self._call = streams, call

    def inputs(self, group: Group, rows: slice, *, teacher: bool) -> Batch:
        """The inputs of a group for a batch of sequences.

        Stores the outputs that later groups replay. At the last group the teacher's block runs to
        its end instead, and its output is stored.

        Args:
            rows: the sequences of the batch.
            teacher: whether to run the teacher's stream too.
        """
        last = group == self._groups[-1]
        closes = group in self._containers and not last
        student = self._input("student", group, rows, self._student_outputs(group, rows))
        if closes:
            self._streams.write(_entering("student", group), rows, student)
        if not teacher:
            return Batch(student)
        replay = self._outputs("teacher", self._closed(group), rows)
        if last:
            with inputs_of(first_linear(self._blocks["teacher"], group)) as seen:
                self._streams.write("teacher", rows, self.run("teacher", rows, replay))
            return Batch(student, seen[0])
        own = self._input("teacher", group, rows, replay)
        if closes:
            output = self._closing("teacher", group)(own)
            self._streams.write(_leaving("teacher", group), rows, output)
        return Batch(student, own)

    def leave(self, group: Group) -> None:
        """Free the activations that only the batches of a group needed."""
        if (before := self._before(group)) is not None:
            self._streams.drop(_entering("student", before))

    def finish(self, rows: slice, *, refined: bool) -> None:
        """Carry the student's stream over the block.

        If ``refined`` is True, factors have changed since, and no stored output is replayed.
        """
        # The last container runs again, because storing the input of its closing linear would need
        # the widest stream.
        replay = self._outputs("student", [] if refined else self._closed(self._groups[-1]), rows)
        self._streams.write("student", rows, self.run("student", rows, replay))

    def drop(self) -> None:
        """Free all stored outputs of containers."""
        for group in self._closed(self._groups[-1]):
            self._streams.drop(*(_leaving(stream, group) for stream in self._blocks))

    def teacher_inputs(self, rows: slice) -> dict[Group, Tensor]:
        """Carry the teacher's stream over the whole block; returns the inputs of its groups."""
        block = self._blocks["teacher"]
        with ExitStack() as stack:
            seen = {g: stack.enter_context(inputs_of(first_linear(block, g))) for g in self._groups}
            output = self.run("teacher", rows, {})
        self._streams.write("teacher", rows, output)
        return {group: inputs.pop() for group, inputs in seen.items()}

    def _student_outputs(self, group: Group, rows: slice) -> dict[Group, Tensor]:
        """The student's outputs of the containers that close before a group.

        If the previous group closes a container, its output is computed here, because that group
        has been replaced by now.
        """
        before, closed = self._before(group), self._closed(group)
        if before not in closed:
            return self._outputs("student", closed, rows)
        entering = self._streams.read(_entering("student", before), rows)
        output = self._closing("student", before)(entering)
        self._streams.write(_leaving("student", before), rows, output)
        return self._outputs("student", closed[:-1], rows) | {before: output}

    def _outputs(self, stream: str, closed: list[Group], rows: slice) -> dict[Group, Tensor]:
        """The stored outputs of containers, by the groups that close them."""
        return {group: self._streams.read(_leaving(stream, group), rows) for group in closed}

    def _before(self, group: Group) -> Group | None:
        place = self._groups.index(group)
        return self._groups[place - 1] if place else None

    def _closed(self, group: Group) -> list[Group]:
        """The groups before this one that close a container."""
        before = self._groups[: self._groups.index(group)]
        return [other for other in before if other in self._containers]

    def _closing(self, stream: str, group: Group) -> nn.Module:
        """The closing linear of the container that a group closes."""
        return self._blocks[stream].get_submodule(self._containers[group].closing)

    def _input(
        self, stream: str, group: Group, rows: slice, replay: Mapping[Group, Tensor]
    ) -> Tensor:
        """Run a block up to the first linear of ``group`` and return that linear's input."""
        linear = first_linear(self._blocks[stream], group)
        return input_of(linear, lambda: self.run(stream, rows, replay))

    def run(self, stream: str, rows: slice | Tensor, replay: Mapping[Group, Tensor]) -> Tensor:
        """Run a block on rows of its stream, with the containers of ``replay`` replayed."""
        hidden, block = self._streams.read(stream, rows), self._blocks[stream]
        args, kwargs = self._call(len(hidden))
        with ExitStack() as stack:
            for closing, value in replay.items():
                stack.enter_context(self._containers[closing].replayed(block, value))
            output = block(hidden, *args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result


def first_linear(block: nn.Module, group: Group) -> nn.Module:
    """The first linear of a group, dense or factored."""
    return group.linear(block, group.members[0])


def _entering(stream: str, group: Group) -> str:
    """Name of the stream of a closing linear's inputs."""
    return f"{stream}-into-{group.path}"


def _leaving(stream: str, group: Group) -> str:
    """Name of the stream of a closing linear's outputs."""
    return f"{stream}-from-{group.path}"
