"""Running a block piecewise: stop it at a linear, or replay a container with a stored output.

A container's output must be the output of its closing linear, alone or in a tuple with items that
the block does not use, such as the weights of eager attention. ``learn_containers`` checks this on
the meta device before the walk starts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from svdserve.compression.model.architecture import Group, LinearCall, Trace
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.system.errors import UserError


@dataclass(frozen=True)
class Container:
    """A container of a block, and the form of its output.

    Attributes:
        path: path of the container in the block.
        closing: path of its closing linear in the block.
        wrapped: None if the output is a tensor; otherwise the output tuple, with None in place of
            its tensors.
        position: index in that tuple of the closing linear's output.
    """

    path: str
    closing: str
    wrapped: tuple[Any, ...] | None = None
    position: int = 0

    def output(self, value: Tensor) -> Tensor | tuple[Any, ...]:
        if self.wrapped is None:
            return value
        return (*self.wrapped[: self.position], value, *self.wrapped[self.position + 1 :])

    @contextmanager
    def replayed(self, block: nn.Module, value: Tensor) -> Iterator[None]:
        """Inside the block, the container returns ``value`` instead of computing."""
        module = block.get_submodule(self.path)
        output = self.output(value)
        module.forward = lambda *_args, **_kwargs: output
        try:
            yield
        finally:
            del module.forward


class Reached(Exception):
    """Stops the run of a block at a linear, and carries the linear's input."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def input_of(linear: nn.Module, run: Callable[[], object]) -> Tensor:
    """Call ``run`` until it calls ``linear``, and return that linear's input."""

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise Reached(args[0])

    hook = linear.register_forward_pre_hook(stop)
    try:
        run()
    except Reached as reached:
        return reached.value
    finally:
        hook.remove()
    raise RuntimeError("the linear was not called")  # learn_containers has seen it called


@contextmanager
def inputs_of(linear: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block, each input of ``linear`` is appended to the list."""
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def learn_containers(trace: Trace, groups: tuple[Group, ...]) -> Mapping[Group, Container]:
    """The containers of a block by the groups that close them.

    The block runs once more on the meta device, with its containers replayed.

    Args:
        trace: of the block.
        groups: the groups in the order in which the walk replaces them.

    Raises:
        UserError: the linears are called in another order, a container changes the output of its
            closing linear, or the block does not return hidden states.
    """
    name = trace.name
    calls = {linear.path: linear for linear in trace.linears}
    expected = [path for group in groups for path in _paths(group)]
    place = {path: index for index, group in enumerate(groups) for path in _paths(group)}
    called = [path for path in calls if path in place]
    if [place[path] for path in called] != sorted(place.values()):
        raise UserError(f"{name}: linears are called as {called}; expected {expected}")
    containers = {
        group: _container(trace, group, [calls[path] for path in _paths(group)])
        for group in groups
        if group.closes
    }
    with ExitStack() as stack:
        for container in containers.values():
            output = calls[container.closing].output
            stack.enter_context(container.replayed(trace.block, output))
        result = trace.run("it fails without its attention and MLP")
    result = result[0] if isinstance(result, tuple) else result
    if not isinstance(result, Tensor) or result.shape != trace.hidden.shape:
        raise UserError(
            f"{name}: does not return hidden states [B, L, d]; this architecture is not supported"
        )
    return containers


def _paths(group: Group) -> list[str]:
    return [f"{group.parent}.{member}" if group.parent else member for member in group.members]


def require_walkable(skeleton: Skeleton, device: torch.device) -> None:
    """Check before a long job that the walk can run a model's blocks piecewise.

    Raises:
        UserError: the arguments of a block depend on the tokens, or ``learn_containers`` refuses
            the block.
    """
    tokens = [torch.tensor([ids]) for ids in ([0, 1], [1, 0])]
    (_, calls), (_, others) = skeleton.embed(tokens, device)
    for index, (call, other) in enumerate(zip(calls, others, strict=True)):
        name = skeleton.block_name(index)
        tensors = zip(tree_leaves(call), tree_leaves(other), strict=True)
        if any(isinstance(a, Tensor) and a is not b and not torch.equal(a, b) for a, b in tensors):
            raise UserError(
                f"{name}: reads the tokens themselves besides the hidden states, such as "
                f"embeddings of its own; architecture {skeleton.model_type!r} is not supported yet"
            )
        learn_containers(skeleton.traces[index], skeleton.groups[index])


def _container(trace: Trace, group: Group, linears: list[LinearCall]) -> Container:
    for linear in linears:
        path = trace.container(linear)
        if path is None:
            continue
        output = trace.outputs[path]
        if not isinstance(output, tuple):
            return Container(path, linear.path)
        wrapped = tuple(None if isinstance(item, Tensor) else item for item in output)
        place = next(i for i, item in enumerate(output) if item is linear.output)
        return Container(path, linear.path, wrapped, place)
    raise UserError(
        f"{trace.name}: {group.parent or 'the block'} does more than return its last linear's "
        "output; this architecture is not supported"
    )
