"""The stage that assembles finished blocks, dense tensors and metadata into a checkpoint."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from svdserve.compression.format.log import LOG_FILE
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.format.schema import CheckpointConfig, ModuleSpec, linears_of
from svdserve.compression.format.tensors import save_tensors
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.format.writer import merge_shards
from svdserve.compression.model.companions import copy_companions
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.card import CARD_FILE, model_card
from svdserve.compression.pipeline.modules import whole_linears
from svdserve.compression.pipeline.plan import Plan
from svdserve.compression.pipeline.recipe import Recipe, dump_recipe
from svdserve.compression.pipeline.workdir import WorkDirectory


def dense_in_block(
    skeleton: Skeleton,
    index: int,
    recipe: Recipe,
    specs: Mapping[str, ModuleSpec],
    encoded: Collection[str],
) -> dict[str, Tensor]:
    """The tensors of a block that the checkpoint takes from the dense model.

    Args:
        specs: the block's factored modules by name.
        encoded: names of the unfactored linears whose weights a codec has encoded.
    """
    factored = [li for name, spec in specs.items() for li in linears_of(name, spec)]
    replaced = {f"{linear}.weight" for linear in (*factored, *encoded)}
    prefix = f"{skeleton.block_name(index)}."
    names = skeleton.files.info
    kept = [n for n in names if n.startswith(prefix) and n not in replaced]
    return _stored(skeleton, kept, recipe)


def assemble(plan: Plan, work: WorkDirectory, specs: Mapping[str, ModuleSpec]) -> Path:
    """Write the checkpoint from finished blocks, dense tensors and metadata; returns its folder.

    Args:
        specs: all factored modules by name.
    """
    skeleton, recipe = plan.skeleton, plan.recipe
    blocks = range(skeleton.blocks)
    prefixes = tuple(f"{skeleton.block_name(index)}." for index in blocks)
    rest = [name for name in skeleton.files.info if not name.startswith(prefixes)]
    save_tensors(_stored(skeleton, rest, recipe), work.rest)
    final, source = work.final(), skeleton.directory
    merge_shards([work.rest, *map(work.block, blocks)], final)
    copy_companions(source, final)
    config = read_json(source / "config.json")
    if not config.get("dtype") and not config.get("torch_dtype"):
        # Without it loaders take the dtype of the first tensor, which factoring may change.
        config["dtype"] = str(skeleton.dtype).removeprefix("torch.")
    if recipe.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = recipe.dtype
    config["quantization_config"] = CheckpointConfig(
        base_model=plan.base_model,
        keep=recipe.keep,
        modules=dict(specs),
        linears=whole_linears(plan.modules, recipe, specs),
        recipe=recipe.model_dump(mode="json"),
    ).dump()
    (final / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (final / "recipe.yaml").write_text(dump_recipe(recipe))
    shutil.copy(work.log, final / LOG_FILE)
    card = model_card(open_checkpoint(final), recipe, source)
    (final / CARD_FILE).write_text(card, encoding="utf-8")
    return final


def _stored(skeleton: Skeleton, names: list[str], recipe: Recipe) -> dict[str, Tensor]:
    """Tensors of the dense model, cast to the recipe's dtype unless that is ``auto``."""
    tensors = skeleton.files.load(names)
    if recipe.dtype == "auto":
        return tensors
    dtype = getattr(torch, recipe.dtype)
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
