"""Factored checkpoints of pico models, each with the dense model that it stands for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from svdserve.compression.format.layouts import Factors, get_layout
from svdserve.compression.format.legacy import GROUPS, role_of
from svdserve.compression.format.schema import (
    CheckpointConfig,
    LinearSpec,
    ModuleSpec,
    parameters_of,
)
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.format.untrusted import read_json

RankRule = Callable[[str, int, int], int]
"""Rank of the module of this name with a weight [m, n]."""

Tensors = dict[str, torch.Tensor]

Factorise = Callable[[torch.Tensor, int, str], Tensors]
"""Matrices and indices of a weight, a rank and the name of a layout, by suffix."""


def truncated_svd(weight: torch.Tensor, rank: int, layout: str) -> Tensors:
    """The best rank-r approximation, computed in float64 and stored in the weight's dtype."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    pair = Factors(s[:rank].sqrt()[:, None] * v[:rank], u[:, :rank] * s[:rank].sqrt())
    tensors = get_layout(layout).encode(pair)
    return {n: t.to(weight.dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def random_factors(weight: torch.Tensor, rank: int, layout: str) -> Tensors:
    """Factors of the right shapes and scale that have nothing to do with the weight; instant."""
    m, n = weight.shape
    outer = (torch.randn(m, rank) * rank**-0.5).to(weight.dtype)
    columns = n if layout == "pair" else n - rank
    inner = (torch.randn(rank, columns) * n**-0.5).to(weight.dtype)
    pivots = {} if layout == "pair" else {"pivots": torch.randperm(n)[:rank].int()}
    return {"factor_in": inner, "factor_out": outer} | pivots


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
    layout: str,
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
    linears: dict[str, LinearSpec] = {}
    codec = "int8" if int8 else "float"
    for module, members in _modules(list(weights), shared):
        parent, _, last = module.rpartition(".")
        names = [f"{parent}.{member}.weight" for member in members]
        if last in keep_dense:
            for name in names:
                linear = name.removesuffix(".weight")
                linears[linear] = LinearSpec(role=role_of(linear), codec=codec)
                if int8:
                    weights[name], weights[f"{name}_scale"] = round_rows(weights[name])
                    products[name] = weights[name] * weights[f"{name}_scale"][:, None]
            continue
        weight = torch.cat([weights.pop(name) for name in names])
        sizes = tuple(products[name].shape[0] for name in names)
        factors = factorise(weight, rank_rule(module, *weight.shape), layout)
        decoded = dict(factors)
        for matrix in ("factor_in", "factor_out") if int8 else ():
            factors[matrix], factors[f"{matrix}_scale"] = round_rows(decoded[matrix])
            decoded[matrix] = factors[matrix] * factors[f"{matrix}_scale"][:, None]
        product = get_layout(layout).dense(decoded)
        products |= dict(zip(names, product.split(sizes), strict=True))
        modules[module] = ModuleSpec.model_validate(
            {"role": role_of(module), "members": members, "layout": layout, "codec": codec}
            | {"rank": factors["factor_out"].shape[1], "in": weight.shape[1], "out": sizes}
        )
        assert factors.keys() == modules[module].tensors().keys()
        weights |= {f"{module}.{suffix}": tensor for suffix, tensor in factors.items()}
    stored, total = parameters_of(modules)
    block = CheckpointConfig(
        base_model=dense.name,
        keep=min(1.0, stored / total) if total else 1.0,
        modules=modules,
        linears=linears,
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
