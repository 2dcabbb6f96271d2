"""`svdserve verify`: compares every served layer with its multiplied-out weights.

Random vectors go through the layer as it is served, and through the product of its factors after
the model's own ``load_weights`` has loaded that product into the dense twin (twin.py). This finds
faults that no check of files can find: a class of vLLM that rearranges weights, a kernel that is
wrong on this processor, a shard that is cut at the wrong place.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import LinearBase

from svdserve.compression.format.reader import Checkpoint
from svdserve.compression.system.errors import UserError
from svdserve.kernels.reference import gated
from svdserve.server.layer_checks import VERIFY, LayerCheck
from svdserve.server.plugin.linear import LowRankLinearMethod
from svdserve.server.plugin.twin import Twin

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_ROUNDED_TOLERANCE = 0.1  # of products that round the activations too
_CHANNEL = 5.0  # one output channel may be off by this many tolerances
_VECTORS = 8


def verify_layers(
    model: nn.Module,
    vllm_config: VllmConfig,
    checkpoint: Checkpoint,
    joined: Mapping[nn.Module, dict[str, Any]],
    prefix: str = "",
) -> list[LayerCheck]:
    """Compare every factored layer of a loaded model with its dense weights.

    All TP ranks must call this together, as row-parallel layers sum over them.

    Args:
        model: as it is served.
        vllm_config: of the model.
        checkpoint: the files that it was loaded from.
        joined: what ``join_layers`` found for the layers when they were loaded.
        prefix: of the names of the model's modules.

    Raises:
        UserError: the model's own code cannot load a layer's weights.
    """
    twin = Twin(vllm_config, prefix)
    generator = torch.Generator().manual_seed(0)
    checks = []
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, LowRankLinearMethod):
            dense = twin.loaded(name, dense_weights(method, checkpoint))
            own = joined.get(layer, {})
            order = method.input_order(checkpoint) if own.get("ordered_input") else None
            checks.append(_check(name, layer, method, dense, generator, order, own))
    return checks


def dense_weights(method: LowRankLinearMethod, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a layer's linears, multiplied out in float32, by their checkpoint names."""
    found: dict[str, Tensor] = {}
    for part in method.parts:
        if part.spec is not None:
            weight = checkpoint.factors(part.names[0]).dense(torch.float32)
            blocks = torch.split(weight, list(part.spec.out_features))
            found |= {f"{n}.weight": b for n, b in zip(part.linears, blocks, strict=True)}
            continue
        for linear in part.names:
            found[f"{linear}.weight"] = checkpoint.weight(linear, torch.float32)
    return found


def _check(
    name: str,
    layer: LinearBase,
    method: LowRankLinearMethod,
    dense: Tensor,
    generator: torch.Generator,
    input_order: Tensor | None,
    joined: Mapping[str, Any],
) -> LayerCheck:
    """``generator`` gives the same inputs on every TP rank; each takes its own channels of them."""
    like = layer.weight
    x = torch.randn(_VECTORS, method.input_size, generator=generator).to(like.dtype)
    x = x[:, method.channels.start : method.channels.stop].contiguous()
    bias = None if layer.skip_bias_add else layer.bias
    given = x if input_order is None else x[:, input_order].contiguous()
    served = method.apply(layer, given.to(like.device), bias).double().cpu()
    expected = x.double() @ dense.double().T
    if method.all_reduces_latent:
        whole = expected.float().to(like.device)
        expected = tensor_model_parallel_all_reduce(whole).cpu().double()
    if bias is not None:
        expected += bias.double().cpu()
    expected = _as_joined(expected, method, joined)
    rounds = any(part.codec.product != "float" for part in method.parts)
    allowed = _ROUNDED_TOLERANCE if rounds else _TOLERANCES[like.dtype]
    return LayerCheck(name, _error(served, expected), allowed)


def _as_joined(y: Tensor, method: LowRankLinearMethod, joined: Mapping[str, Any]) -> Tensor:
    """Outputs [k, m] as the layer gives them once it is joined with the rest of its gated MLP."""
    order, activation = joined.get("row_order"), joined.get("activation")
    if order is not None:
        blocks = torch.split(y, method.output_sizes, dim=1)
        y = torch.cat([block[:, order] for block in blocks], dim=1)
    return y if activation is None else gated(y, activation)


def _error(served: Tensor, expected: Tensor) -> float:
    """The error that ``LayerCheck`` describes, of float64 outputs [k, m]."""
    wrong = served - expected
    whole = float(expected.norm())
    if whole == 0:
        return float(wrong.norm())
    mean_channel = whole / expected.shape[1] ** 0.5
    channels = wrong.norm(dim=0) / expected.norm(dim=0).clamp_min(mean_channel)
    worst = float(channels.max())
    error = max(float(wrong.norm()) / whole, worst / _CHANNEL)
    return error if error == error else float("inf")  # the worst layer is found by comparing


def verify(directory: Path, tensor_parallel_size: int = 1, dtype: str = "auto") -> list[LayerCheck]:
    """Load a checkpoint into vLLM and compare every layer, on every TP rank.

    Raises:
        UserError: the engine did not start; vLLM's messages above say why.
    """
    os.environ[VERIFY] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if tensor_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from svdserve.server.cpu_install import work_around
    from svdserve.server.worker import EXTENSION, METHOD, WorkerReport

    work_around()
    from vllm import LLM

    try:
        engine = LLM(
            str(directory),
            dtype=dtype,
            enforce_eager=True,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=64,
            max_num_seqs=1,
            worker_extension_cls=EXTENSION,
        )
    except (RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{directory}: vLLM did not start: {first}") from None
    reports = map(WorkerReport.model_validate, engine.collective_rpc(METHOD))
    return [check for report in reports for check in report.checks]
