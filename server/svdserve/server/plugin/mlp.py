"""Gated MLPs of a vLLM model, y = down(act(gate) * up): what their two layers can do at once.

Order. down_proj needs no gather where gate_up_proj writes its outputs in the order that
``input_order`` of down_proj names: its rows are free to be stored in any order.

Activation. Where one kernel of svdserve computes gate_up_proj, it may apply the activation to its
sums too. gate and up are then neither written nor read, and on CPU two operations of torch less run
for each layer.

Both are for MLPs whose code, traced, is that chain and no more; another keeps vLLM's order.
"""

from collections.abc import Iterator
from operator import getitem
from typing import Any

from torch import fx, nn
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

from svdserve.compression.format.reader import Checkpoint
from svdserve.kernels import Activation
from svdserve.server.plugin.linear import LowRankLinearMethod

CHAIN = ("gate_up_proj", "act_fn", "down_proj")


def join_layers(model: nn.Module, checkpoint: Checkpoint) -> dict[nn.Module, dict[str, Any]]:
    """Arguments of ``LowRankLinearMethod.load`` for the layers of gated MLPs.

    An activation that a layer takes over is replaced in the model by the identity. LoRA adapters
    know nothing of all this: a model that may get some is to be left alone.
    """
    found: dict[nn.Module, dict[str, Any]] = {}
    for mlp in _gated_mlps(model):
        first, last = mlp.gate_up_proj, mlp.down_proj
        method, next_method = (getattr(layer, "quant_method", None) for layer in (first, last))
        if not isinstance(method, LowRankLinearMethod) or first.bias is not None:
            continue
        joined = found[first] = {}
        activation = _activation(mlp.act_fn)
        if activation and method.fuses(first, activation):
            joined["activation"] = activation
            mlp.act_fn = nn.Identity()
        if isinstance(next_method, LowRankLinearMethod):
            order = next_method.input_order(checkpoint)
            if order is not None and set(method.output_sizes) == {len(order)}:
                joined["row_order"] = order
                found[last] = {"ordered_input": True}
    return found


def _gated_mlps(model: nn.Module) -> Iterator[Any]:
    for mlp in model.modules():
        children = dict(mlp.named_children())
        gated = isinstance(children.get("act_fn"), (SiluAndMul, GeluAndMul))
        if gated and children.keys() == set(CHAIN) and is_plain_chain(mlp):
            yield mlp


def _activation(module: nn.Module) -> Activation | None:
    if isinstance(module, SiluAndMul):
        return "silu"
    tanh = isinstance(module, GeluAndMul) and module.approximate == "tanh"
    return "gelu_tanh" if tanh else None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, *_: object) -> bool:
        return True


def is_plain_chain(mlp: nn.Module) -> bool:
    """Whether the forward pass is down_proj(act_fn(gate_up_proj(x))) and nothing else.

    Some models scale the gate in between (Falcon-H1), which only their code tells.
    """
    try:
        nodes = list(_Tracer().trace(mlp).nodes)
    except Exception:  # whatever code does that can not be traced, it is no plain chain
        return False
    value, seen = nodes[-1].args[0], {nodes[-1]}
    for name in reversed(CHAIN):
        if isinstance(value, fx.Node) and value.target is getitem and value.args[1] == 0:
            seen.add(value)
            value = value.args[0]
        if not isinstance(value, fx.Node) or value.target != name or len(value.args) != 1:
            return False
        seen.add(value)
        value = value.args[0]
    inputs = [node for node in nodes if node.op == "placeholder"]
    # vLLM's linear layers also return a bias, which the code unpacks and drops.
    dropped = [node for node in nodes if node.target is getitem and node.args[1] == 1]
    return value in inputs and seen | {*inputs, *dropped} == set(nodes)
