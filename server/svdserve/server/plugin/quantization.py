"""What config.json's ``quant_method: svdserve`` selects in vLLM: which linear is factored, and how.

Interface: vllm/model_executor/layers/quantization/base_config.py.
"""

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.format.schema import QUANT_METHOD, CheckpointConfig, parse_config
from svdserve.server.plugin.layer_parts import layer_parts
from svdserve.server.plugin.linear import LowRankLinearMethod
from svdserve.server.plugin.loader import require_supported_load_format


class SvdserveConfig(QuantizationConfig):  # type: ignore[misc]
    """The ``quantization_config`` block of a checkpoint, asked by every vLLM layer at creation."""

    def __init__(self, checkpoint: CheckpointConfig) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        # vLLM's names of modules and encoded linears -> the checkpoint's names. They differ in
        # models that vLLM nests differently from transformers.
        listed = (*checkpoint.modules, *checkpoint.encoded_linears)
        self.module_names = {name: name for name in listed}

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # plain matrix products run on every device

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # the block is part of config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SvdserveConfig":
        """Raises UserError when the block is malformed."""
        return cls(parse_config(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check the files of a local directory before any worker starts on them.

        A model from the Hub is not downloaded yet; the loader checks it.

        Raises:
            UserError: the files are no valid checkpoint; see ``open_checkpoint``.
        """
        del hf_config, revision
        if Path(model_name).is_dir():
            open_checkpoint(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.module_names = hf_to_vllm_mapper.apply_dict(self.module_names)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; None (embeddings, attention, experts) means vLLM's default.

        Raises:
            UserError: this load format cannot load an svdserve checkpoint.
        """
        if not isinstance(layer, LinearBase):
            return None
        require_supported_load_format()
        packed = self.packed_modules_mapping
        parts = layer_parts(self.checkpoint, self.module_names, prefix, packed)
        return LowRankLinearMethod(prefix, parts) if parts else UnquantizedLinearMethod()
