"""The modules of a model that a recipe factors, and the codec and dtype of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from svdserve.compression.format.codecs import Storage, get_codec
from svdserve.compression.format.codecs.base import FLOAT_DTYPES
from svdserve.compression.format.schema import LinearSpec, ModuleSpec, parameters_of
from svdserve.compression.model.architecture import Group
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.recipe import Grouping, Recipe
from svdserve.compression.system.errors import UserError


@dataclass(frozen=True)
class ModulePlan:
    """A planned module: its group, its name in the model, and its linears.

    Attributes:
        rows: rows of its members in the group's stacked weight [m, n].
        in_features: input channels n.
    """

    group: Group
    name: str
    members: tuple[str, ...]
    rows: slice
    in_features: int

    @property
    def out_features(self) -> int:
        """Rows of the module's own stacked weight."""
        return int(self.rows.stop - self.rows.start)

    @property
    def parent(self) -> str:
        """Full name of the torch module that holds the linears."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def linears(self) -> list[str]:
        """Full names of the members."""
        return [f"{self.parent}.{member}" for member in self.members]


Modules = list[list[ModulePlan]]
"""The modules of every block, in the order of its groups."""


def plan_modules(skeleton: Skeleton, grouping: Grouping) -> Modules:
    """One module for each group (grouping ``shared``) or for each linear (``separate``)."""
    return [_of_block(skeleton, index, grouping) for index in range(skeleton.blocks)]


def _of_block(skeleton: Skeleton, index: int, grouping: Grouping) -> list[ModulePlan]:
    prefix = skeleton.block_name(index)
    found: list[ModulePlan] = []
    for group in skeleton.groups[index]:
        parent = skeleton.layers[index].get_submodule(group.parent)
        shapes = [parent.get_submodule(m).get_parameter("weight").shape for m in group.members]
        columns = shapes[0][1]
        if grouping == "shared":
            rows = slice(0, sum(shape[0] for shape in shapes))
            name = f"{prefix}.{group.path}"
            found.append(ModulePlan(group, name, group.members, rows, columns))
            continue
        start, holder = 0, ".".join(filter(None, (prefix, group.parent)))
        for member, shape in zip(group.members, shapes, strict=True):
            rows = slice(start, start + shape[0])
            found.append(ModulePlan(group, f"{holder}.{member}", (member,), rows, columns))
            start = rows.stop
    return found


def every(modules: Modules) -> list[ModulePlan]:
    """The modules of all blocks."""
    return [module for block in modules for module in block]


def plan_storage(skeleton: Skeleton, modules: Modules, recipe: Recipe) -> dict[str, Storage]:
    """Codec and dtype of every module, by its name.

    The dtype is the recipe's or, for ``auto``, the promoted dtype of the module's linears.

    Raises:
        UserError: a linear's weight is no floating-point tensor, or the recipe's dtype is ``auto``
            and factors cannot be stored in the weight's dtype.
    """
    codec, found = get_codec(recipe.weights), {}
    for module in every(modules):
        dtypes = [skeleton.files.info[f"{linear}.weight"].dtype for linear in module.linears]
        for linear, dtype in zip(module.linears, dtypes, strict=True):
            named = str(dtype).removeprefix("torch.")
            if not dtype.is_floating_point:
                raise UserError(
                    f"{linear}.weight is {named}, which is no floating-point weight; give the "
                    "original model"
                )
            if recipe.dtype == "auto" and dtype not in FLOAT_DTYPES and not recipe.keeps_all:
                raise UserError(
                    f"{linear}.weight is {named}, which factors cannot be stored in; give --dtype "
                    "float32, bfloat16 or float16"
                )
        own = reduce(torch.promote_types, dtypes) if recipe.dtype == "auto" else None
        found[module.name] = Storage(codec, own or getattr(torch, recipe.dtype))
    return found


def whole_linears(
    modules: Modules, recipe: Recipe, specs: Mapping[str, ModuleSpec]
) -> dict[str, LinearSpec]:
    """The linears of ``modules`` that are not factored, by their full names."""
    return {
        linear: LinearSpec(role=module.group.role, codec=recipe.weights)
        for module in every(modules)
        if module.name not in specs
        for linear in module.linears
    }


def parameters_with_dense(modules: Modules, specs: Mapping[str, ModuleSpec]) -> tuple[int, int]:
    """Stored and dense parameters of all modules, including modules that stay dense."""
    stored, dense = parameters_of(specs)
    left = [module for module in every(modules) if module.name not in specs]
    kept = sum(module.out_features * module.in_features for module in left)
    return stored + kept, dense + kept


def dense_bytes(skeleton: Skeleton, modules: Modules) -> dict[str, Any]:
    """Bytes of all tensors of the dense model, and of each linear of ``modules``, for the log."""
    info = skeleton.files.info
    linears = [linear for module in every(modules) for linear in module.linears]
    return {
        "nbytes": sum(tensor.nbytes for tensor in info.values()),
        "linears": {linear: info[f"{linear}.weight"].nbytes for linear in linears},
    }
