"""The walk through blocks of another make than Llama's, against brute force."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import random_tokens
from svdserve.compression.format.codecs import FLOAT
from svdserve.compression.model.architecture import Trace, find_groups
from svdserve.compression.pipeline.walk.walk import Walk

CPU, D, LENGTH = torch.device("cpu"), 8, 6


class _Mixer(nn.Module):
    """Fused queries, keys and values, with a linear between them and the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate, self.dense = (nn.Linear(D, n) for n in (3 * D, D, D))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        seen = (q @ k.mT + mask).softmax(-1) @ v
        return self.dense(seen * self.gate(seen).sigmoid()), None


class _Plain(nn.Module):
    """An MLP without a gate, its linears one level down."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Block(nn.Module):
    """Three containers, the first two side by side, and a linear behind them all."""

    def __init__(self, *, tail: bool) -> None:
        super().__init__()
        self.mixer, self.side, self.last = _Mixer(), _Plain(), _Plain()
        self.tail = nn.Linear(D, D) if tail else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x, (D,))
        x = x + self.mixer(normed, mask)[0] + self.side(normed)
        x = x + self.last(nn.functional.layer_norm(x, (D,)))
        return x if self.tail is None else self.tail(x)


class _Skeleton:
    """What the walk asks of a model."""

    blocks = 2

    def __init__(self, *, tail: bool) -> None:
        torch.manual_seed(0)
        self.layers = [_Block(tail=tail) for _ in range(self.blocks)]
        self.table = torch.randn(512, D)
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        self.call: tuple[Any, ...] = ((mask,), {})
        shape = torch.Size((1, LENGTH, D))
        self.traces = [Trace(block, self.call, shape, "block") for block in self.layers]
        self.groups = [find_groups(trace) for trace in self.traces]

    def embed(self, batches: list[Tensor], _device: torch.device) -> Iterator[Any]:
        for tokens in batches:
            yield self.table[tokens], [self.call] * self.blocks

    def block(self, index: int, _device: torch.device) -> nn.Module:
        return copy.deepcopy(self.layers[index]).requires_grad_(False)


def inputs(layers: list[nn.Module], at: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = at.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for layer in layers:
            hidden = layer(hidden, mask)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


@pytest.mark.parametrize("tail", [False, True])
def test_any_sequence_of_groups(*, tail: bool) -> None:
    skeleton, tokens = _Skeleton(tail=tail), random_tokens(5, LENGTH)
    names = [f"{group.role} {group.path}" for group in skeleton.groups[0]]
    assert (
        names
        == [
            "attention_in mixer.qkv",
            "other mixer.gate",
            "attention_out mixer.dense",
            "mlp_in side.net.0",
            "mlp_out side.net.2",
            "mlp_in last.net.0",
            "mlp_out last.net.2",
        ]
        + ["other tail"] * tail
    )
    student = [copy.deepcopy(layer) for layer in skeleton.layers]
    wanted = frozenset({"gram", "shift", "teacher_gram"})
    walk = Walk(skeleton, tokens, wanted, torch.float32, CPU, batch_size=2)
    hidden, mask = skeleton.table[tokens], skeleton.call[0][0]
    close = {"rtol": 1e-4, "atol": 1e-5}
    for index in range(skeleton.blocks):
        block = walk.block(index)
        for group in block.groups:
            x, x_f = (
                inputs(layers, group.linear(layers[index], group.members[0]), hidden, mask)
                for layers in (student, skeleton.layers)
            )
            got = block.statistics(group)
            torch.testing.assert_close(got.gram, x.T @ x / len(x), **close)
            torch.testing.assert_close(got.shift, (x_f - x).T @ x / len(x), **close)
            torch.testing.assert_close(got.teacher_gram, x_f.T @ x_f / len(x), **close)
            for member in group.members:
                weight = block.weight(group, member)
                other = weight + 0.1 * torch.randn(weight.shape)
                block.replace_weight(group, member, other, FLOAT)
                group.linear(student[index], member).weight.data.copy_(other)
        block.finish()
        # Nothing is left of a block but the two streams.
        assert sorted(walk.streams._tensors) == ["student", "teacher"]
    with torch.no_grad():
        expected = hidden
        for layer in student:
            expected = layer(expected, mask)
    torch.testing.assert_close(walk.streams.read("student", slice(None)), expected, **close)
