"""svdserve checkpoints made by plain truncated SVD, and their multiplied-out dense twins.

Independent of the compression methods: tests of readers compare a checkpoint with a dense model
that any transformers or vLLM can load.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdserve.compression.checkpoint import open_checkpoint
from svdserve.compression.factors import Factors, Layout, interpolative
from svdserve.compression.schema import GROUPS, CheckpointConfig, ModuleSpec

PARENTS = {
    "qkv_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_up_proj": "mlp",
    "down_proj": "mlp",
}


def make_checkpoint(
    dense: Path,
    target: Path,
    twin: Path,
    layout: Layout = "interpolative",
    shared: bool = True,
    keep: float = 0.8,
    rank: int | None = None,
    keep_dense: tuple[str, ...] = (),
) -> Path:
    """Factor every linear of the blocks of ``dense`` by truncated SVD.

    Args:
        dense: a Hugging Face directory with a Llama-like model in model.safetensors.
        target: the svdserve checkpoint to write.
        twin: the dense model to write, with the factors multiplied out in float64.
        layout, shared: how the factors are stored.
        keep: its share of min(out, in) is the rank, unless ``rank`` gives one for all modules.
        keep_dense: groups, linears or full module names to leave dense, such as ``"o_proj"`` or
            ``"model.layers.0.mlp.gate_up_proj"``.

    Returns:
        ``target``, which passed ``open_checkpoint``.
    """
    config = json.loads((dense / "config.json").read_text())
    tensors = load_file(dense / "model.safetensors")
    multiplied = dict(tensors)
    modules: dict[str, ModuleSpec] = {}
    for layer in range(config["num_hidden_layers"]):
        for group, members in GROUPS.items():
            parent = f"model.layers.{layer}.{PARENTS[group]}"
            for name, linears in _modules(group, members, shared):
                if name in keep_dense or f"{parent}.{name}" in keep_dense:
                    continue
                weights = [tensors.pop(f"{parent}.{linear}.weight") for linear in linears]
                factors = _svd(torch.cat(weights), layout, keep, rank)
                for suffix in ("factor_in", "factor_out", "pivots"):
                    value = getattr(factors, suffix)
                    if value is not None:
                        tensors[f"{parent}.{name}.{suffix}"] = value
                exact = factors.to(torch.float64).dense().to(weights[0].dtype)
                rows = exact.split([weight.shape[0] for weight in weights])
                for linear, weight in zip(linears, rows, strict=True):
                    multiplied[f"{parent}.{linear}.weight"] = weight.contiguous()
                modules[f"{parent}.{name}"] = ModuleSpec(
                    members=linears,
                    layout=layout,
                    rank=factors.rank,
                    in_features=weights[0].shape[1],
                    out_features=tuple(weight.shape[0] for weight in weights),
                )
    block = CheckpointConfig(base_model=dense.name, keep=keep, modules=modules).dump()
    _write(dense, twin, config, multiplied)
    _write(dense, target, {**config, "quantization_config": block}, tensors)
    open_checkpoint(target)
    return target


def _modules(
    group: str, members: tuple[str, ...], shared: bool
) -> list[tuple[str, tuple[str, ...]]]:
    return [(group, members)] if shared else [(member, (member,)) for member in members]


def _svd(weight: Tensor, layout: Layout, keep: float, rank: int | None) -> Factors:
    """Truncated SVD, stored in the dtype of ``weight``."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = rank or max(1, round(keep * len(values)))
    pair = Factors(right[:rank].contiguous(), (left[:, :rank] * values[:rank]).contiguous())
    return (interpolative(pair) if layout == "interpolative" else pair).to(weight.dtype)


def _write(source: Path, target: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    skip = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(source, target, ignore=skip)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
