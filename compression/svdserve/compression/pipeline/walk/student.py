"""Putting new weights into the checkpoint's tensors and into the student.

The student gets the tensors as rounded for storage, in a first and in a resumed run, because it
must see the weights that will be served.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdserve.compression.format.codecs import Codec, Storage, get_codec
from svdserve.compression.format.codecs.base import decoded
from svdserve.compression.format.schema import LinearSpec, ModuleSpec
from svdserve.compression.format.stored import StoredFactors
from svdserve.compression.pipeline.modules import ModulePlan
from svdserve.compression.pipeline.walk.walk import BlockPass


def put_factors(
    block: BlockPass, module: ModulePlan, factors: StoredFactors, tensors: dict[str, Tensor]
) -> ModuleSpec:
    """Add the factors of a module to ``tensors`` and to the student; returns its spec."""
    spec = ModuleSpec.model_validate(
        {
            "role": module.group.role,
            "members": module.members,
            "layout": factors.layout.name,
            "codec": factors.codec.name,
            "rank": factors.rank,
            "in": module.in_features,
            "out": [block.weight(module.group, member).shape[0] for member in module.members],
        }
    )
    for suffix in spec.tensors():
        tensors[f"{module.name}.{suffix}"] = factors.tensors[suffix].cpu().contiguous()
    block.replace(module.group, module.leaf, spec, factors)
    return spec


def put_whole(
    block: BlockPass,
    module: ModulePlan,
    storage: Storage,
    tensors: dict[str, Tensor],
    gram: Tensor | None,
) -> Tensor:
    """Add the encoded dense weights of a module to ``tensors`` and, decoded, to the student.

    Args:
        gram: X Xᵀ [n, n] of the module's inputs, for which the weights are rounded; None to round
            each value by itself.

    Returns:
        The decoded weights, stacked [m, n].
    """
    for member, name in zip(module.members, module.linears, strict=True):
        tensors |= storage.encode(f"{name}.weight", block.weight(module.group, member), gram)
    return _replace_weights(block, module, storage.codec, tensors)


def put_back(
    block: BlockPass,
    modules: list[ModulePlan],
    specs: Mapping[str, ModuleSpec],
    whole: Mapping[str, LinearSpec],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put the stored weights of a finished block back into the student, and advance the streams.

    Args:
        modules: the modules of the block.
        specs: specs of its factored modules, by name.
        whole: specs of its other linears, by name.
        tensors: the stored tensors of the block, by name.
    """
    for group in block.groups:
        block.statistics(group, collect=False)
        for module in modules:
            if module.group != group:
                continue
            if (spec := specs.get(module.name)) is not None:
                stored = {suffix: tensors[f"{module.name}.{suffix}"] for suffix in spec.tensors()}
                factors = StoredFactors(*spec.layout_and_codec(), stored)
                block.replace(group, module.leaf, spec, factors)
            elif not (codec := get_codec(whole[module.linears[0]].codec)).plain:
                _replace_weights(block, module, codec, tensors)


def _replace_weights(
    block: BlockPass, module: ModulePlan, codec: Codec, tensors: Mapping[str, Tensor]
) -> Tensor:
    weights = [decoded(codec, f"{name}.weight", tensors, torch.float32) for name in module.linears]
    for member, weight in zip(module.members, weights, strict=True):
        block.replace_weight(module.group, member, weight, codec)
    return torch.cat(weights).to(block.walk.device)
