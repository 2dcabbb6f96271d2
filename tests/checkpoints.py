"""Factored checkpoints of pico models, each with the dense model that it stands for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from svdserve.compression.format.factors import interpolative, parameters

from svdserve.compression.format.layouts import Factors, Layout
from svdserve.compression.format.legacy import GROUPS
from svdserve.compression.format.schema import CheckpointConfig, ModuleSpec
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.format.untrusted import read_json

RankRule = Callable[[str, int, int], int]
"""Rank of the module of this name with a weight [m, n]."""

Factorise = Callable[[torch.Tensor, int, Layout], Factors]


def truncated_svd(weight: torch.Tensor, rank: int, layout: Layout) -> Factors:
    """The best rank-r approximation, computed in float64 and stored in the weight's dtype."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    pair = Factors(s[:rank].sqrt()[:, None] * v[:rank], u[:, :rank] * s[:rank].sqrt())
    return (pair if layout == "pair" else interpolative(pair)).to(weight.dtype)


def random_factors(weight: torch.Tensor, rank: int, layout: Layout) -> Factors:
    """Factors of the right shapes and scale that have nothing to do with the weight; instant."""
    m, n = weight.shape
    outer = (torch.randn(m, rank) * rank**-0.5).to(weight.dtype)
    columns = n if layout == "pair" else n - rank
    inner = (torch.randn(rank, columns) * n**-0.5).to(weight.dtype)
    return Factors(inner, outer, None if layout == "pair" else torch.randperm(n)[:rank].int())


def round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 values [m, n] and float32 scales [m]: 127 stands for the greatest of each row."""
    scale = (weight.double().abs().max(dim=1).values / 127).float()
    return (weight.double() / scale.double()[:, None]).round().to(torch.int8), scale


def unequal_ranks(module: str, out_features: int, in_features: int) -> int:
    """About half of the full rank, but another for each kind of module and each layer."""
    layer = next((int(part) for part in module.split(".") if part.isdigit()), 0)
    return min(out_features, in_features) // 2 - 3 * (sum(map(ord, module[-9:])) % 5) - layer


def write_checkpoint(
    dense: Path,
    target: Path,
    *,
    layout: Layout,
    shared: bool,
    keep_dense: frozenset[str] = frozenset(),
    rank_rule: RankRule = unequal_ranks,
    factorise: Factorise = truncated_svd,
    reference: Path | None = None,
    int8: bool = False,
) -> Path:
    """Factor every linear of ``dense``.

    Args:
        dense: Hugging Face directory with one safetensors file.
        target: directory of the factored checkpoint.
        shared: one factorisation for the stacked weight of a group, or one for each linear.
        keep_dense: last name components of modules that stay dense.
        reference: where to write the same model with every factored weight multiplied out.
        int8: round all factors, and the linears that stay dense.
    """
    weights = load_file(dense / SINGLE_FILE)
    products = dict(weights)
    modules: dict[str, ModuleSpec] = {}
    int8_linears: list[str] = []
    stored = total = 0
    for module, members in _modules(list(weights), shared):
        last = module.rpartition(".")[2]
        parent = module.rpartition(".")[0]
        names = [f"{parent}.{member}.weight" for member in members]
        if last in keep_dense:
            for name in names if int8 else []:
                int8_linears.append(name.removesuffix(".weight"))
                weights[name], weights[f"{name}_scale"] = round_rows(weights[name])
                products[name] = weights[name] * weights[f"{name}_scale"][:, None]
            continue
        weight = torch.cat([weights.pop(name) for name in names])
        sizes = tuple(products[name].shape[0] for name in names)
        rank = rank_rule(module, *weight.shape)
        factors = factorise(weight, rank, layout)
        if int8:
            inner, outer = round_rows(factors.factor_in), round_rows(factors.factor_out)
            factors = Factors(inner[0], outer[0], factors.pivots, inner[1], outer[1])
        products |= dict(zip(names, factors.dense().split(sizes), strict=True))
        modules[module] = ModuleSpec.model_validate(
            {"members": members, "layout": layout, "rank": factors.rank}
            | {"in": weight.shape[1], "out": sizes, "weights": "int8" if int8 else "float"}
        )
        for suffix in modules[module].tensors():
            weights[f"{module}.{suffix}"] = getattr(factors, suffix)
        stored += parameters(layout, *weight.shape, factors.rank)
        total += weight.numel()
    block = CheckpointConfig(
        format_version=2 if int8 else 1,
        base_model=dense.name,
        keep=min(1.0, stored / total) if total else 1.0,
        modules=modules,
        int8_linears=tuple(int8_linears),
    )
    _write(dense, target, weights, {"quantization_config": block.dump()})
    if reference is not None:
        _write(dense, reference, products, {})
    return target


def _modules(names: list[str], shared: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Modules and their members, for every block whose linears have the usual names."""
    parents = {name.rpartition(".")[0].rpartition(".")[0] for name in names}
    return [
        (f"{parent}.{module}", chosen)
        for parent in sorted(parents)
        for group, members in GROUPS.items()
        if all(f"{parent}.{member}.weight" in names for member in members)
        for module, chosen in (
            [(group, members)] if shared else [(member, (member,)) for member in members]
        )
    ]


def _write(
    source: Path, target: Path, weights: dict[str, torch.Tensor], extra: dict[str, object]
) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = read_json(source / "config.json") | extra
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: w.contiguous() for name, w in weights.items()}, target / SINGLE_FILE)
