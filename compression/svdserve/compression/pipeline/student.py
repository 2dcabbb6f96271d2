"""What a unit's new weights become: tensors of the checkpoint, and modules of the student.

Tensors are rounded as they are stored before the student gets them, in a first run and in a resumed
one alike: it must see what will be served.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdserve.compression.format.codecs import Codec, Storage, get_codec
from svdserve.compression.format.codecs.base import decoded
from svdserve.compression.format.legacy import role_of
from svdserve.compression.format.schema import LinearSpec, ModuleSpec
from svdserve.compression.format.stored import StoredFactors
from svdserve.compression.pipeline.plan import Unit
from svdserve.compression.pipeline.walk import BlockPass


def put_factors(
    block: BlockPass, unit: Unit, factors: StoredFactors, tensors: dict[str, Tensor]
) -> ModuleSpec:
    """Add the factors to ``tensors`` and to the student."""
    spec = ModuleSpec.model_validate(
        {
            "role": role_of(unit.name),
            "members": unit.members,
            "layout": factors.layout.name,
            "codec": factors.codec.name,
            "rank": factors.rank,
            "in": unit.columns,
            "out": [block.weight(unit.group, member).shape[0] for member in unit.members],
        }
    )
    for suffix in spec.tensors():
        tensors[f"{unit.name}.{suffix}"] = factors.tensors[suffix].cpu().contiguous()
    block.replace(unit.group, unit.name.rpartition(".")[2], spec, factors)
    return spec


def put_whole(block: BlockPass, unit: Unit, storage: Storage, tensors: dict[str, Tensor]) -> Tensor:
    """Add the dense weights of a unit to both, as they are stored; returns them stacked [m, n]."""
    for member, name in zip(unit.members, unit.linears, strict=True):
        tensors |= storage.encode(f"{name}.weight", block.weight(unit.group, member))
    return _replace_weights(block, unit, storage.codec, tensors)


def replay(
    block: BlockPass,
    units: list[Unit],
    specs: Mapping[str, ModuleSpec],
    whole: Mapping[str, LinearSpec],
    tensors: Mapping[str, Tensor],
) -> None:
    """Carry the streams through a block that is finished, with what ``tensors`` hold of it.

    Args:
        units: of the block.
        specs: of its factored units.
        whole: of its other linears.
    """
    for group in block.groups:
        block.statistics(group, collect=False)
        for unit in units:
            if unit.group != group:
                continue
            if (spec := specs.get(unit.name)) is not None:
                stored = {suffix: tensors[f"{unit.name}.{suffix}"] for suffix in spec.tensors()}
                factors = StoredFactors(*spec.layout_and_codec(), stored)
                block.replace(group, unit.name.rpartition(".")[2], spec, factors)
            elif not (codec := get_codec(whole[unit.linears[0]].codec)).plain:
                _replace_weights(block, unit, codec, tensors)


def _replace_weights(
    block: BlockPass, unit: Unit, codec: Codec, tensors: Mapping[str, Tensor]
) -> Tensor:
    weights = [decoded(codec, f"{name}.weight", tensors, torch.float32) for name in unit.linears]
    for member, weight in zip(unit.members, weights, strict=True):
        block.replace_weight(unit.group, member, weight)
    return torch.cat(weights).to(block.walk.device)
