"""The groups of a block and their roles, found by running the block once on the meta device.

The linears of one module that read the same tensor are a group. A container is a module whose
output is the output of one of its linears, the closing linear; attention and MLP are containers. A
group that reads the same input as the container's first group has a role ``*_in``, and the group of
the closing linear has a role ``*_out``. A container that is called with masks, positions or caches
is an attention.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from svdserve.compression.format.roles import Role
from svdserve.compression.model.building import foreign_code
from svdserve.compression.system.errors import UserError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a block besides the hidden states."""


@dataclass(frozen=True)
class Group:
    """The linears of one block that read the same input.

    Args:
        role: the role of the group in its block.
        parent: path inside the block of the module that holds the linears.
        members: attribute names of the linears in ``parent``, in stacking order.
    """

    role: Role
    parent: str
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        """One name for all members, such as ``qkv_proj``."""
        return merged_name(self.members)

    @property
    def path(self) -> str:
        """Name of the group's module inside the block, such as ``self_attn.qkv_proj``."""
        return f"{self.parent}.{self.name}" if self.parent else self.name

    @property
    def attends(self) -> bool:
        """Whether the group belongs to an attention."""
        return self.role in ("attention_in", "attention_out")

    @property
    def closes(self) -> bool:
        """Whether one of the linears is the closing linear of its container."""
        return self.role in ("attention_out", "mlp_out", "expert_out")

    def linear(self, block: nn.Module, member: str) -> nn.Module:
        """The linear ``member`` of a block, dense or factored."""
        return block.get_submodule(self.parent).get_submodule(member)


def merged_name(members: tuple[str, ...]) -> str:
    """One name for several linears, such as ``qkv_proj``, ``gate_up_proj``, ``query_key_value``.

    A suffix that all names share, from the last underscore on, appears once at the end. Stems of a
    single letter are joined without an underscore.
    """
    if len(members) == 1:
        return members[0]
    ends = [member.rpartition("_") for member in members]
    shared = len({end for _, _, end in ends}) == 1 and all(stem for stem, _, _ in ends)
    stems = [stem for stem, _, _ in ends] if shared else list(members)
    between = "" if all(len(stem) == 1 for stem in stems) else "_"
    joined = between.join(stems) + (f"_{ends[0][2]}" if shared else "")
    return joined.replace(".", "_")


@dataclass(frozen=True)
class LinearCall:
    """The first call of a linear in a run of a block; ``path`` is relative to the block."""

    path: str
    input: Tensor
    output: Tensor


class Trace:
    """One run of a copy of a block on the meta device.

    Args:
        block: the block; its parameters may be on meta.
        call: the arguments besides the hidden states, as the decoder passes them.
        shape: shape [B, L, d] of the hidden states.
        name: the block's name, for messages.

    Attributes:
        linears: calls of the block's linears, in order.
        outputs: the output of each module, by path.
        given: the tensors that each module was called with, by path.

    Raises:
        UserError: the block's own code fails.
    """

    def __init__(self, block: nn.Module, call: Call, shape: torch.Size, name: str) -> None:
        self.block, self.name = copy.deepcopy(block).to("meta"), name
        self.call: Call = tree_map_only(Tensor, lambda t: t.to("meta"), call)
        self.hidden = torch.empty(shape, device="meta")
        self.linears: list[LinearCall] = []
        self.outputs: dict[str, Any] = {}
        self.given: dict[str, list[Tensor]] = {}
        hooks = [
            module.register_forward_hook(self._watch(path), with_kwargs=True)
            for path, module in self.block.named_modules()
            if path
        ]
        self.run("its own code fails")
        for hook in hooks:
            hook.remove()

    def run(self, step: str) -> Any:
        """Run the block and return its output; ``step`` says in an error message what failed."""
        args, kwargs = self.call
        with foreign_code(f"block {self.name}", step), torch.no_grad():
            return self.block(self.hidden, *args, **kwargs)

    def _watch(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if isinstance(module, nn.Linear) and path not in self.outputs and tensors:
                self.linears.append(LinearCall(path, tensors[0], output))
            self.outputs[path] = output
            self.given[path] = tensors

        return hook

    def container(self, closing: LinearCall) -> str | None:
        """Path of the outermost module inside the block with the same output as a linear."""
        parts = closing.path.split(".")[:-1]
        paths = (".".join(parts[: end + 1]) for end in range(len(parts)))
        return next((p for p in paths if holds(self.outputs.get(p), closing.output)), None)

    def attends(self, path: str) -> bool:
        """Whether a module is called with a tensor of the block's other arguments, as a mask."""
        handed = {id(leaf) for leaf in tree_leaves(self.call) if isinstance(leaf, Tensor)}
        return any(id(tensor) in handed for tensor in self.given.get(path, ()))


def holds(output: Any, tensor: Tensor) -> bool:
    """Whether a module's output is ``tensor``, or a tuple that contains it once."""
    items = output if isinstance(output, tuple) else (output,)
    return sum(item is tensor for item in items) == 1


def find_groups(trace: Trace) -> tuple[Group, ...]:
    """All groups of a block in the order of their first calls, with their roles."""
    found: dict[tuple[int, str], list[LinearCall]] = {}
    for call in trace.linears:
        found.setdefault((id(call.input), call.path.rpartition(".")[0]), []).append(call)
    places = {path: call.path for call in trace.linears if (path := trace.container(call))}
    inside: dict[str, list[list[LinearCall]]] = {}
    for (_, parent), calls in found.items():
        inside.setdefault(_place(parent, places), []).append(calls)
    attentions = {place for place in inside if trace.attends(place)} or {next(iter(inside), "")}
    roles: dict[str, Role] = {}
    for place, groups in inside.items():
        opens: Role = "attention_in" if place in attentions else "mlp_in"
        ends: Role = "attention_out" if place in attentions else "mlp_out"
        # In a module that is no container, the last linear called takes the closing linear's role.
        closing = places.get(place, groups[-1][-1].path)
        for calls in groups:
            role: Role = "other"
            if len(groups) > 1 and place:
                if any(call.path == closing for call in calls):
                    role = ends
                elif calls[0].input is groups[0][0].input:
                    role = opens
            roles[calls[0].path] = role
    return tuple(
        Group(roles[calls[0].path], parent, tuple(call.path.rpartition(".")[2] for call in calls))
        for (_, parent), calls in found.items()
    )


def _place(parent: str, containers: Iterable[str]) -> str:
    """The outermost container around a group's parent, or the parent itself."""
    around = [path for path in containers if f"{parent}.".startswith(f"{path}.")]
    return min(around, key=len, default=parent)


# svdserve supports blocks that have each of these groups exactly once, as separate linears.
_TAKEN: dict[Role, tuple[str, ...]] = {
    "attention_in": ("q_proj", "k_proj", "v_proj"),
    "attention_out": ("o_proj",),
    "mlp_in": ("gate_proj", "up_proj"),
    "mlp_out": ("down_proj",),
}


def not_taken(block: nn.Module) -> str | None:
    """Why svdserve does not support a block, judged by its modules; None if it does.

    This refuses fused linears, MLPs without a gate, experts and so on.
    """
    for members in _TAKEN.values():
        holders = [
            path
            for path, module in block.named_modules()
            if all(isinstance(getattr(module, member, None), nn.Linear) for member in members)
        ]
        if len(holders) != 1:
            return (
                f"has {len(holders)} modules with the linears {', '.join(members)}; exactly one is "
                "needed"
            )
    return None


def taken(groups: tuple[Group, ...], name: str) -> tuple[Group, ...]:
    """The groups of a block that are factored, in the order of their calls.

    Args:
        name: the block's name, for messages.

    Raises:
        UserError: the linears are not called in the groups that svdserve supports.
    """
    called = [member for group in groups for member in group.members]
    chosen: dict[Group, Group] = {}
    for role, members in _TAKEN.items():
        fits = [g for g in groups if g.role == role and set(members) <= set(g.members)]
        if len(fits) == 1:
            chosen[fits[0]] = replace(fits[0], members=members)
        elif len(members) > 1 and set(members) <= set(called):
            raise UserError(f"{name}: {', '.join(members)} do not read the same input")
        else:
            expected = [member for members in _TAKEN.values() for member in members]
            raise UserError(f"{name}: linears are called as {called}; expected {expected}")
    return tuple(chosen[group] for group in groups if group in chosen)
