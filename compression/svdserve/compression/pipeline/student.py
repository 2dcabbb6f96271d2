"""What a unit's new weights become: tensors of the checkpoint, and modules of the student.

Tensors are rounded as they are stored before the student gets them, in a first run and in a resumed
one alike: it must see what will be served.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdserve.compression.format.factors import Factors
from svdserve.compression.format.int8 import packed, unpacked
from svdserve.compression.format.schema import ModuleSpec
from svdserve.compression.pipeline.plan import Unit
from svdserve.compression.pipeline.walk import BlockPass


def put_factors(
    block: BlockPass, unit: Unit, factors: Factors, tensors: dict[str, Tensor]
) -> ModuleSpec:
    """Add the factors, in their stored form, to ``tensors`` and to the student."""
    spec = ModuleSpec(
        members=unit.members,
        layout=factors.layout,
        rank=factors.rank,
        **{"in": unit.columns},
        out=tuple(block.weight(unit.group, member).shape[0] for member in unit.members),
        weights=factors.weights,
    )
    for suffix in spec.tensors():
        tensors[f"{unit.name}.{suffix}"] = getattr(factors, suffix).cpu().contiguous()
    block.replace(unit.group, unit.name.rpartition(".")[2], spec, factors)
    return spec


def put_int8(block: BlockPass, unit: Unit, tensors: dict[str, Tensor]) -> Tensor:
    """Add the dense weights of a unit to both, rounded to int8; returns them stacked [m, n]."""
    for member, name in zip(unit.members, unit.linears, strict=True):
        tensors |= packed(f"{name}.weight", block.weight(unit.group, member))
    return _replace_weights(block, unit, tensors)


def replay(
    block: BlockPass,
    units: list[Unit],
    specs: Mapping[str, ModuleSpec],
    tensors: Mapping[str, Tensor],
) -> None:
    """Carry the streams through a block that is finished, with what ``tensors`` hold of it.

    Args:
        units: of the block.
        specs: of its factored units; the others are dense.
    """
    for group in block.groups:
        block.statistics(group, collect=False)
        for unit in units:
            if unit.group == group:
                _put_stored(block, unit, specs.get(unit.name), tensors)


def _put_stored(
    block: BlockPass, unit: Unit, spec: ModuleSpec | None, tensors: Mapping[str, Tensor]
) -> None:
    """Give the student what ``tensors`` hold of a unit; ``spec`` is None where it is dense."""
    if spec is not None:
        factors = Factors(**{key: tensors[f"{unit.name}.{key}"] for key in spec.tensors()})
        block.replace(unit.group, unit.name.rpartition(".")[2], spec, factors)
    elif f"{unit.linears[0]}.weight_scale" in tensors:
        _replace_weights(block, unit, tensors)


def _replace_weights(block: BlockPass, unit: Unit, tensors: Mapping[str, Tensor]) -> Tensor:
    weights = [unpacked(f"{name}.weight", tensors) for name in unit.linears]
    for member, weight in zip(unit.members, weights, strict=True):
        block.replace_weight(unit.group, member, weight)
    return torch.cat(weights).to(block.walk.device)
