"""Gated MLPs of a vLLM model, y = down(act(gate) * up): how their two layers work together.

Order. The rows of gate_up_proj may be stored in any order. If it writes its outputs in the order
that ``input_order`` of down_proj names, down_proj needs no gather.

Activation. If one kernel of svdserve computes gate_up_proj, it may also apply the activation to its
sums. Memory then never holds gate and up, and on CPU each layer runs two torch operations fewer.

Both need an MLP whose traced code is that chain and nothing else; any other MLP stays as vLLM has
it. The activation is also taken over by a gate_up_proj that is not factored (whole.py).
"""

from collections.abc import Iterator
from operator import getitem
from typing import Any

from torch import fx, nn
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

from svdserve.compression.format.reader import Checkpoint
from svdserve.kernels import Activation
from svdserve.server.plugin.linear import LowRankLinearMethod
from svdserve.server.plugin.whole import WholeLinearMethod

CHAIN = ("gate_up_proj", "act_fn", "down_proj")


def join_layers(model: nn.Module, checkpoint: Checkpoint) -> dict[nn.Module, dict[str, Any]]:
    """Arguments of ``LowRankLinearMethod.load`` for the layers of gated MLPs.

    If a layer takes over an activation, the identity replaces that activation in the model. Do not
    call this for a model that may get LoRA adapters, which expect the plain order and activation.
    """
    found: dict[nn.Module, dict[str, Any]] = {}
    for mlp in _gated_mlps(model):
        first, last = mlp.gate_up_proj, mlp.down_proj
        method, next_method = (getattr(layer, "quant_method", None) for layer in (first, last))
        if not isinstance(method, LowRankLinearMethod) or first.bias is not None:
            continue
        joined = found[first] = {}
        if activation := _take_activation(mlp, method):
            joined["activation"] = activation
        if isinstance(next_method, LowRankLinearMethod):
            order = next_method.input_order(checkpoint)
            if order is not None and set(method.output_sizes) == {len(order)}:
                joined["row_order"] = order
                found[last] = {"ordered_input": True}
    return found


def join_activations(model: nn.Module) -> int:
    """Let each gate_up_proj that is not factored take over the activation, if its kernel can.

    As ``join_layers``, this is not for a model that may get LoRA adapters.

    Returns:
        The number of these layers.
    """
    count = 0
    for mlp in _gated_mlps(model):
        method = getattr(mlp.gate_up_proj, "quant_method", None)
        if isinstance(method, WholeLinearMethod) and mlp.gate_up_proj.bias is None:
            method.activation = _take_activation(mlp, method)
            count += method.activation is not None
    return count


def _take_activation(
    mlp: Any, method: LowRankLinearMethod | WholeLinearMethod
) -> Activation | None:
    """Replace the activation by the identity if the method of gate_up_proj can apply it."""
    activation = _activation(mlp.act_fn)
    if activation is None or not method.fuses(mlp.gate_up_proj, activation):
        return None
    mlp.act_fn = nn.Identity()
    return activation


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

    Some models scale the gate in between (Falcon-H1), which only their code shows.
    """
    try:
        nodes = list(_Tracer().trace(mlp).nodes)
    except Exception:  # code that cannot be traced is no plain chain
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
