"""Which MLPs may be joined: what their code does beside its three layers, traced."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from svdserve.compression.format.schema import ModuleSpec
from svdserve.server.plugin.layer_parts import LayerPart
from svdserve.server.plugin.linear import LowRankLinearMethod
from svdserve.server.plugin.mlp import is_plain_chain


class Layer(nn.Linear):
    """Returns its outputs and no bias, as vLLM's layers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate.sigmoid() * up


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = Layer(4, 8), Layer(4, 4), Gate()


class Plain(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(x)
        x = self.act_fn(gate_up)
        x, _ = self.down_proj(x)
        return x


class Renamed(MLP):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        del scale
        return activate(self.act_fn, self.gate_up_proj(x)[0], self)


def activate(act: Callable[[Tensor], Tensor], x: Tensor, mlp: MLP) -> Tensor:
    y: Tensor = mlp.down_proj(act(x))[0]
    return y


class ScaledInPlace(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gate_up_proj(x)
        x[:, :4] *= 2
        return self.down_proj(self.act_fn(x))[0]


class Scaled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gate_up_proj(x)
        return self.down_proj(self.act_fn(x) * 2)[0]


class Kept(MLP):
    """What the activation gets is used once more."""

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gate_up_proj(x)
        return self.down_proj(self.act_fn(x))[0] + x[:, :4]


class Residual(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gate_up_proj(x)
        return self.down_proj(self.act_fn(y))[0] + x


class Dynamic(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


@pytest.mark.parametrize("mlp", [Plain, Renamed])
def test_a_chain_is_found(mlp: type[MLP]) -> None:
    assert is_plain_chain(mlp())


@pytest.mark.parametrize("mlp", [ScaledInPlace, Scaled, Kept, Residual, Dynamic])
def test_anything_else_in_between_is_seen(mlp: type[MLP]) -> None:
    mlp()(torch.ones(2, 4))  # its forward pass works
    assert not is_plain_chain(mlp())


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_a_kernel_without_activations_leaves_them_to_vllm(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDSERVE_KERNEL", kernel)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = ModuleSpec.model_validate(
        {
            "role": "mlp_in",
            "members": ["gate_proj", "up_proj"],
            "layout": "pair",
            "codec": "float",
            "rank": 16,
            "in": 64,
            "out": [32, 32],
        }
    )
    method = LowRankLinearMethod("gate_up_proj", (LayerPart(("mlp.gate_up_proj",), spec),))
    method.input_size, method.channels = 64, range(64)
    layer = nn.Linear(64, 64, dtype=torch.bfloat16)
    assert not method.fuses(layer, "silu")
