"""The two-stream block walk: teacher and student, block by block, one block in memory.

Both streams hold the hidden states of all calibration tokens at the same block boundary. Inside a
block they advance group by group (q,k,v → o → gate,up → down), so that the statistics of a group
are taken after all earlier groups of the same block are already replaced in the student. The
block's own forward is run each time, stopped at the group in hand, with the attention or MLP
container replayed from its stored output: attention and every linear are computed once for each
stream, only norms, residual additions and the student's gate and up are repeated, and what the
error is measured on (measure.py). Where no student
runs there is nothing to wait for, and the teacher's block runs once for all its groups.
"""

import copy
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svdserve.compression.format.codecs import FLOAT
from svdserve.compression.format.legacy import GROUPS
from svdserve.compression.format.schema import ModuleSpec
from svdserve.compression.format.stored import StoredFactors
from svdserve.compression.model.containers import input_of, inputs_of, learn_containers
from svdserve.compression.model.modules import replace_group
from svdserve.compression.model.skeleton import Call, Group, Skeleton
from svdserve.compression.pipeline.measure import Measured, measured_rows
from svdserve.compression.statistics.gradients import BoundaryGradients, back_through
from svdserve.compression.statistics.moments import (
    OF_GRADIENTS,
    Accumulator,
    GradientAccumulator,
    Statistic,
    Statistics,
)
from svdserve.compression.system.files import reserve
from svdserve.compression.system.machine import Precision, forward_precision

Inputs = tuple[Tensor, Tensor | None]
"""A group's inputs in the student and in the teacher, None where that does not run."""


class Streams:
    """Named activations [N, L, width] of all calibration tokens, in memory or in files.

    Rows are read in float32 on the run's device and stored in the recipe's dtype.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, folder: Path | None
    ) -> None:
        self.rows, self.length = shape
        self._dtype, self._device, self._folder = dtype, device, folder
        self._tensors: dict[str, Tensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str, rows: slice | Tensor) -> Tensor:
        return self._tensors[name][rows].to(device=self._device, dtype=torch.float32)

    def write(self, name: str, rows: slice, value: Tensor) -> None:
        if name not in self._tensors:
            self._tensors[name] = self._allocate(name, value.shape[-1])
        self._tensors[name][rows] = value.to(device="cpu", dtype=self._dtype)

    def _allocate(self, name: str, width: int) -> Tensor:
        shape = (self.rows, self.length, width)
        if self._folder is None:
            return torch.empty(shape, dtype=self._dtype)
        # Without a name once it is open: a kill leaves nothing, and no other job can meet it.
        descriptor, path = tempfile.mkstemp(prefix=f"{name}-", suffix=".bin", dir=self._folder)
        size = self.rows * self.length * width
        try:
            with os.fdopen(descriptor, "wb") as file:
                # A sparse file would end the process with SIGBUS where the disk is full.
                reserve(file, size * self._dtype.itemsize)
            stream = torch.from_file(path, shared=True, size=size, dtype=self._dtype)
        finally:
            os.unlink(path)
        return stream.view(shape)

    def drop(self, *names: str) -> None:
        for name in names:
            self._tensors.pop(name, None)


class Walk:
    """Carries both streams through the blocks of a model.

    Args:
        skeleton: the model.
        tokens: [N, L] token ids.
        wanted: the statistics that the method needs; they decide which streams run.
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
        wanted: frozenset[Statistic],
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
        self.wanted, self.wanted_of_gradients = wanted - OF_GRADIENTS, wanted & OF_GRADIENTS
        self.uses_student = both or bool(wanted & {"gram", "shift"})
        self.uses_teacher = both or bool(wanted - {"gram"})  # gradients are the teacher's too
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
        """Of the hidden states where the streams are (measure.py); None if one does not run."""
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

    def block(self, index: int) -> "BlockPass":
        """Load block ``index`` and prepare to replace its groups in order."""
        return BlockPass(self, index)


class BlockPass:
    """One block on its way from dense to factored.

    Use: for every group in ``groups``, ``statistics`` then (optionally) ``replace``; at the end
    ``finish``.
    """

    def __init__(self, walk: Walk, index: int) -> None:
        self.walk, self.index = walk, index
        self.groups = walk.skeleton.groups[index]
        self.teacher = walk.skeleton.block(index, walk.device)
        self.student = _share_copy(self.teacher)
        self._of_gradients: dict[str, GradientAccumulator] = {}
        self._of_teacher: dict[str, Accumulator] = {}

    def weight(self, group: Group, member: str) -> Tensor:
        """The teacher's weight [m, n] of one linear, float32."""
        linear = self.teacher.get_submodule(group.parent).get_submodule(member)
        weight = linear.weight
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
            statistics = self._of_teacher.pop(group.name).finish()
        if collect and self.walk.wanted_of_gradients:
            return self._of_gradients.pop(group.name).into(statistics)
        return statistics

    def _accumulator(self, group: Group, wanted: frozenset[Statistic]) -> Accumulator:
        features = self.weight(group, group.members[0]).shape[1]
        return Accumulator(features, wanted, self.walk.device)

    def _along_student(self, group: Group, wanted: frozenset[Statistic]) -> Statistics:
        """One step of the student's stream, and of the teacher's where it runs."""
        accumulator = self._accumulator(group, wanted - {"held_out"})
        apart = self._accumulator(group, wanted & {"gram", "shift"})
        held_out = self.walk.held_out if "held_out" in wanted else ()
        for rows in self.walk.batches:
            with self._forward():
                inputs = self._STEPS[group.name](self, rows)
            (apart if rows in held_out else accumulator).add(*inputs)
        if group.name == "gate_up_proj":
            self.walk.streams.drop("student_heads")
        statistics = accumulator.finish()
        return replace(statistics, held_out=apart.finish()) if held_out else statistics

    def _teacher_sums(self, wanted: frozenset[Statistic]) -> dict[str, Accumulator]:
        """Carry the teacher's stream over the block, where no student runs, and sum on the way."""
        sums = {group.name: self._accumulator(group, wanted) for group in self.groups}
        for rows in self.walk.batches if self.walk.runs else ():
            with ExitStack() as stack, self._forward():
                seen = {
                    name: stack.enter_context(inputs_of(self._linear(self.teacher, name)))
                    for name in sums
                }
                output = self._run(self.teacher, "teacher", rows, {})
            self.walk.streams.write("teacher", rows, output)
            for name, inputs in seen.items():
                sums[name].add(None, inputs.pop())
        return sums

    def _gradient_sums(self) -> dict[str, GradientAccumulator]:
        """Run the teacher's block back from its boundary gradients, before its stream moves on."""
        walk = self.walk
        assert walk.gradients is not None, "whoever wants gradients must have swept them"
        sums = {
            group.name: GradientAccumulator(
                sum(self.weight(group, member).shape[0] for member in group.members),
                walk.wanted_of_gradients,
                walk.device,
            )
            for group in self.groups
        }
        gradients = walk.gradients.read(self.index)
        for row, gradient in zip(walk.gradients.rows, gradients, strict=True):
            rows = slice(row, row + 1)
            hidden = walk.streams.read("teacher", rows)
            call = walk.call(self.index, 1)
            upper = gradient[None].to(hidden)
            for name, flow in back_through(self.teacher, self.groups, hidden, call, upper)[
                0
            ].items():
                sums[name].add(flow.inputs, flow.gradients)
        return sums

    def replace(self, group: Group, name: str, spec: ModuleSpec, factors: StoredFactors) -> None:
        """Put factors into the student; they act from the next group on."""
        parent = self.student.get_submodule(group.parent)
        # Stored precision first: the student must see what will be served.
        spec = spec.model_copy(update={"codec": FLOAT.name})
        factors = StoredFactors(factors.layout, FLOAT, factors.decoded(torch.float32))
        replace_group(parent, name, spec, factors, torch.float32, self.walk.device)
        parent.requires_grad_(False)

    def replace_weight(self, group: Group, member: str, weight: Tensor) -> None:
        """Give one linear of the student another dense weight [m, n], float32."""
        linear = self.student.get_submodule(group.parent).get_submodule(member)
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
        streams = self.walk.streams
        if self.walk.uses_student:
            for rows in self.walk.batches:
                with self._forward():
                    # The MLP is run again, as its widest activations would be the largest stream.
                    replay = {} if refined else {"o_proj": streams.read("student_attention", rows)}
                    streams.write("student", rows, self._run(self.student, "student", rows, replay))
        streams.drop("teacher_attention", "student_attention")
        self.walk.measure(self.index, self.teacher, self.student)

    # One step per group: its inputs for a batch. What a later step needs is stored on the way.

    def _at_attention_input(self, rows: slice) -> Inputs:
        student, teacher = self._input(self.student, "student", rows, "qkv_proj", {}), None
        if self.walk.uses_teacher:
            teacher = self._input(self.teacher, "teacher", rows, "qkv_proj", {})
        return student, teacher

    def _at_attention_output(self, rows: slice) -> Inputs:
        student, teacher = self._input(self.student, "student", rows, "o_proj", {}), None
        self.walk.streams.write("student_heads", rows, student)
        if self.walk.uses_teacher:
            teacher = self._input(self.teacher, "teacher", rows, "o_proj", {})
            attention = self._linear(self.teacher, "o_proj")(teacher)
            self.walk.streams.write("teacher_attention", rows, attention)
        return student, teacher

    def _at_mlp_input(self, rows: slice) -> Inputs:
        heads = self.walk.streams.read("student_heads", rows)
        attention = self._linear(self.student, "o_proj")(heads)
        self.walk.streams.write("student_attention", rows, attention)
        replay = {"o_proj": attention}
        student, teacher = self._input(self.student, "student", rows, "gate_up_proj", replay), None
        if self.walk.uses_teacher:
            replay = {"o_proj": self.walk.streams.read("teacher_attention", rows)}
            teacher = self._input(self.teacher, "teacher", rows, "gate_up_proj", replay)
        return student, teacher

    def _at_mlp_output(self, rows: slice) -> Inputs:
        streams = self.walk.streams
        replay = {"o_proj": streams.read("student_attention", rows)}
        student, teacher = self._input(self.student, "student", rows, "down_proj", replay), None
        if self.walk.uses_teacher:
            replay = {"o_proj": streams.read("teacher_attention", rows)}
            with inputs_of(self._linear(self.teacher, "down_proj")) as seen:
                streams.write("teacher", rows, self._run(self.teacher, "teacher", rows, replay))
            teacher = seen[0]
        return student, teacher

    # On the class: bound methods kept by the instance would make a cycle, and a finished block
    # would hold its memory until the garbage collector comes by.
    _STEPS: ClassVar[dict[str, Callable[["BlockPass", slice], Inputs]]] = {
        "qkv_proj": _at_attention_input,
        "o_proj": _at_attention_output,
        "gate_up_proj": _at_mlp_input,
        "down_proj": _at_mlp_output,
    }

    def _forward(self) -> AbstractContextManager[None]:
        return forward_precision(self.walk.precision, self.walk.device)

    def _input(
        self, block: nn.Module, stream: str, rows: slice, group: str, replay: dict[str, Tensor]
    ) -> Tensor:
        """Run ``block`` up to the first linear of ``group`` and return that linear's input."""
        linear = self._linear(block, group)
        return input_of(linear, lambda: self._run(block, stream, rows, replay))

    def _run(
        self, block: nn.Module, stream: str, rows: slice | Tensor, replay: dict[str, Tensor]
    ) -> Tensor:
        """Run ``block`` on a stream's rows with the containers of ``replay`` left out."""
        hidden = self.walk.streams.read(stream, rows)
        args, kwargs = self.walk.call(self.index, len(hidden))
        with ExitStack() as stack:
            for closing, value in replay.items():
                container = self.walk.containers[self.index][closing]
                stack.enter_context(container.replayed(block, value))
            output = block(hidden, *args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result

    def _linear(self, block: nn.Module, group: str) -> nn.Module:
        """The first linear of a group, dense or factored."""
        parent = next(g.parent for g in self.groups if g.name == group)
        return block.get_submodule(parent).get_submodule(GROUPS[group][0])


def _share_copy(block: nn.Module) -> nn.Module:
    """A copy of the module tree over the same parameter tensors."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in block.parameters()}
    return copy.deepcopy(block, shared)
