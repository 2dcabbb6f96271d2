"""The last step of a compression: finished blocks, dense tensors and metadata as a checkpoint."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from svdserve.compression.format.log import LOG_FILE
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.format.schema import (
    CheckpointConfig,
    LinearSpec,
    ModuleSpec,
    linears_of,
)
from svdserve.compression.format.tensors import save_tensors
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.format.writer import merge_shards
from svdserve.compression.model.companions import copy_companions
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.card import CARD_FILE, model_card
from svdserve.compression.pipeline.recipe import Recipe, dump_recipe
from svdserve.compression.pipeline.workdir import WorkDirectory
from svdserve.compression.system.errors import UserError


class Assembly:
    """Writes what is not factored, and then the checkpoint.

    Args:
        skeleton: the dense model.
        work: holds the finished blocks.
        recipe: what was computed.
        base_model: the name of the dense model that the checkpoint records.
    """

    def __init__(
        self, skeleton: Skeleton, work: WorkDirectory, recipe: Recipe, base_model: str
    ) -> None:
        self._skeleton, self._work = skeleton, work
        self._recipe, self._base_model = recipe, base_model

    def _stored(self, names: list[str]) -> dict[str, Tensor]:
        """Unfactored tensors, in the stored dtype where the recipe names one."""
        tensors = self._skeleton.files.load(names)
        if self._recipe.dtype == "auto":
            return tensors
        dtype = getattr(torch, self._recipe.dtype)
        return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}

    def check_cast(self) -> None:
        """Refuse weights that the recipe's dtype cannot hold; reads them if it has less range.

        Raises:
            UserError: names the first such tensor.
        """
        if self._recipe.dtype != "float16":
            return
        limit = torch.finfo(torch.float16).max
        for name, info in self._skeleton.files.info.items():
            if info.dtype.is_floating_point and info.dtype != torch.float16:
                low, high = self._skeleton.files.load([name])[name].float().aminmax()
                if max(-float(low), float(high)) > limit:
                    raise UserError(
                        f"{name}: holds {max(-float(low), float(high)):.3g}, and the largest "
                        f"number of float16 is {limit:g}; give --dtype bfloat16 or float32"
                    )

    def dense_in_block(
        self, index: int, specs: dict[str, ModuleSpec], encoded: Collection[str]
    ) -> dict[str, Tensor]:
        """The tensors of a block that neither factors nor the weights of ``encoded`` replace."""
        factored = [li for name, spec in specs.items() for li in linears_of(name, spec)]
        replaced = {f"{linear}.weight" for linear in (*factored, *encoded)}
        prefix = f"{self._skeleton.block_name(index)}."
        names = self._skeleton.files.info
        return self._stored([n for n in names if n.startswith(prefix) and n not in replaced])

    def assemble(self, specs: dict[str, ModuleSpec], linears: dict[str, LinearSpec]) -> Path:
        """Put the finished blocks, the rest and the metadata together in the work directory."""
        blocks = range(self._skeleton.blocks)
        prefixes = tuple(f"{self._skeleton.block_name(index)}." for index in blocks)
        rest = [name for name in self._skeleton.files.info if not name.startswith(prefixes)]
        save_tensors(self._stored(rest), self._work.rest)
        final, source = self._work.final(), self._skeleton.directory
        merge_shards([self._work.rest, *map(self._work.block, blocks)], final)
        copy_companions(source, final)
        config = read_json(source / "config.json")
        if not config.get("dtype") and not config.get("torch_dtype"):
            # Loaders would take the dtype of some tensor, and the order of these is another now.
            config["dtype"] = str(self._skeleton.dtype).removeprefix("torch.")
        if self._recipe.dtype != "auto":
            config.pop("torch_dtype", None)
            config["dtype"] = self._recipe.dtype
        config["quantization_config"] = CheckpointConfig(
            base_model=self._base_model,
            keep=self._recipe.keep,
            modules=specs,
            linears=linears,
            recipe=self._recipe.model_dump(mode="json"),
        ).dump()
        (final / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (final / "recipe.yaml").write_text(dump_recipe(self._recipe))
        shutil.copy(self._work.log, final / LOG_FILE)
        card = model_card(open_checkpoint(final), self._recipe, source)
        (final / CARD_FILE).write_text(card, encoding="utf-8")
        return final
