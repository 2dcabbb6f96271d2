"""Running a block piecewise: stop it at a linear, or replay a container from a stored output.

A container is the module that holds o_proj (attention) or down_proj (MLP). Its output must be the
output of that linear, alone or in a tuple beside things that the block does not use, such as the
weights of eager attention; ``learn_containers`` proves this, and the order of the calls, by runs on
the meta device before any real work.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from svdserve.compression.format.legacy import GROUPS
from svdserve.compression.model.building import foreign_code
from svdserve.compression.model.skeleton import Call, Group, Skeleton
from svdserve.compression.system.errors import UserError

CLOSING = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Container:
    """Where a container is in the block, and how its output wraps that of its closing linear."""

    path: str
    # None: a bare tensor. Otherwise the tuple, with None where tensors were.
    wrapped: tuple[Any, ...] | None = None
    position: int = 0

    def output(self, value: Tensor) -> Tensor | tuple[Any, ...]:
        if self.wrapped is None:
            return value
        return (*self.wrapped[: self.position], value, *self.wrapped[self.position + 1 :])

    @contextmanager
    def replayed(self, block: nn.Module, value: Tensor) -> Iterator[None]:
        """While inside, the container returns ``value`` instead of computing."""
        module = block.get_submodule(self.path)
        output = self.output(value)
        module.forward = lambda *_args, **_kwargs: output
        try:
            yield
        finally:
            del module.forward


class Reached(Exception):
    """A block was run as far as wanted; carries the input of the linear it stopped at."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def input_of(linear: nn.Module, run: Any) -> Tensor:
    """Call ``run`` until it calls ``linear``, and return what it calls it with."""

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise Reached(args[0])

    hook = linear.register_forward_pre_hook(stop)
    try:
        run()
    except Reached as reached:
        return reached.value
    finally:
        hook.remove()
    raise RuntimeError("the linear was not called")  # learn_containers has seen the call


@contextmanager
def inputs_of(linear: nn.Module) -> Iterator[list[Tensor]]:
    """While inside, what ``linear`` is called with is added to the list."""
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def learn_containers(
    block: nn.Module, groups: tuple[Group, ...], call: Call, shape: torch.Size, name: str
) -> Mapping[str, Container]:
    """The containers of a block, by their closing linear, from one run on the meta device.

    Args:
        block: the block; its parameters may be on meta.
        groups: its groups, in the order that the walk will take.
        call: the arguments besides the hidden states.
        shape: of the hidden states, [B, L, d].
        name: of the block, for messages.

    Raises:
        UserError: the linears of a group do not share their input, are called in another order, or
            a container does more after its closing linear than return it.
    """
    block = copy.deepcopy(block).to("meta")
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), call)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Any] = {}

    def watch(key: str) -> Any:
        def hook(_module: nn.Module, given: tuple[Tensor, ...], output: Any) -> None:
            if given:
                inputs[key] = given[0]
            outputs[key] = output

        return hook

    parents = {group.name: group.parent for group in groups}
    for group in groups:
        for member in group.members:
            linear = block.get_submodule(group.parent).get_submodule(member)
            linear.register_forward_hook(watch(member))
    for closing in CLOSING:
        block.get_submodule(parents[closing]).register_forward_hook(watch(f"container {closing}"))
    hidden = torch.empty(shape, device="meta")
    with foreign_code(name, "one of its blocks was run"), torch.no_grad():
        block(hidden, *args, **kwargs)

    expected = [member for members in GROUPS.values() for member in members]
    called = [key for key in outputs if key in expected]
    order = {m: i for i, members in enumerate(GROUPS.values()) for m in members}
    if len(called) != len(expected) or [order[m] for m in called] != sorted(order.values()):
        raise UserError(f"{name}: linears are called as {called}; expected {expected}")
    for members in GROUPS.values():
        if any(inputs[member] is not inputs[members[0]] for member in members):
            raise UserError(f"{name}: {', '.join(members)} do not read the same input")
    containers = {
        key: _container(parents[key], outputs[f"container {key}"], outputs[key], name)
        for key in CLOSING
    }
    with ExitStack() as stack, torch.no_grad():
        step = "it was run with its attention and MLP left out"
        stack.enter_context(foreign_code(name, step))
        for key, container in containers.items():
            stack.enter_context(container.replayed(block, outputs[key]))
        result = block(hidden, *args, **kwargs)
    result = result[0] if isinstance(result, tuple) else result
    if not isinstance(result, Tensor) or result.shape != shape:
        raise UserError(
            f"{name}: does not return hidden states [B, L, d]; this architecture is not supported"
        )
    return containers


def require_walkable(skeleton: Skeleton, device: torch.device) -> None:
    """Find out before the long part whether the walk can take a model's blocks apart.

    Raises:
        UserError: the arguments of a block depend on the tokens, or see ``learn_containers``.
    """
    tokens = [torch.tensor([ids]) for ids in ([0, 1], [1, 0])]
    (hidden, calls), (_, others) = skeleton.embed(tokens, device)
    for index, (call, other) in enumerate(zip(calls, others, strict=True)):
        name = skeleton.block_name(index)
        tensors = zip(tree_leaves(call), tree_leaves(other), strict=True)
        if any(isinstance(a, Tensor) and a is not b and not torch.equal(a, b) for a, b in tensors):
            raise UserError(
                f"{name}: reads the tokens themselves besides the hidden states, such as "
                f"embeddings of its own; architecture {skeleton.model_type!r} is not supported yet"
            )
        groups, block = skeleton.groups[index], skeleton.layers[index]
        learn_containers(block, groups, call, hidden.shape, name)


def _container(path: str, output: Any, tensor: Tensor, name: str) -> Container:
    if output is tensor and path:
        return Container(path)
    if isinstance(output, tuple) and path:
        places = [i for i, item in enumerate(output) if item is tensor]
        if len(places) == 1:
            wrapped = tuple(None if isinstance(item, Tensor) else item for item in output)
            return Container(path, wrapped, places[0])
    raise UserError(
        f"{name}: {path or 'the block'} does more than return its last linear's output; "
        "this architecture is not supported"
    )
