"""What config.json's ``quant_method: svdserve`` selects in vLLM: which linear is factored, and how.

Interface: vllm/model_executor/layers/quantization/base_config.py. A vLLM layer may merge several
linears of the checkpoint (``qkv_proj``, ``gate_up_proj``); ``SvdserveConfig.parts`` says in which
pieces the checkpoint stores it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from svdserve.compression.format.codecs import FLOAT, Codec, get_codec
from svdserve.compression.format.reader import WEIGHT, open_checkpoint
from svdserve.compression.format.schema import (
    QUANT_METHOD,
    CheckpointConfig,
    ModuleSpec,
    linears_of,
    parse_config,
)

# Layers that vLLM merges. About 30 of its model files declare no packed_modules_mapping.
_MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class LayerPart:
    """Consecutive outputs of a vLLM layer that one weight of the checkpoint produces.

    Attributes:
        names: in the checkpoint: one factored module, or whole linears that stand side by side.
        spec: the factored module's; None for whole linears.
        codec: of the weight's matrices.
    """

    names: tuple[str, ...]
    spec: ModuleSpec | None
    codec: Codec = FLOAT

    @property
    def outputs(self) -> int:
        """How many of the layer's logical outputs (``output_partition_sizes``) it covers."""
        return len(self.names) if self.spec is None else len(self.spec.members)

    @property
    def linears(self) -> list[str]:
        """Full names of the linears that it stands for, in the checkpoint."""
        return list(self.names) if self.spec is None else linears_of(self.names[0], self.spec)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Last parts of the names of the tensors that store it."""
        if self.spec is not None:
            return tuple(self.spec.tensors())
        return tuple(f"{WEIGHT}{suffix}" for suffix in self.codec.shapes((0, 0)))


class SvdserveConfig(QuantizationConfig):  # type: ignore[misc]
    """The ``quantization_config`` block of a checkpoint, asked by every vLLM layer at creation."""

    def __init__(self, checkpoint: CheckpointConfig) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        # Names of modules and encoded linears as vLLM spells them -> as the checkpoint does; they
        # differ in models that vLLM nests differently from transformers.
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
        return []  # the block lives in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SvdserveConfig":
        """Raises UserError when the block is malformed."""
        return cls(parse_config(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check a local directory's files; here, so that no worker starts on a broken one.

        Raises:
            UserError: see ``open_checkpoint``. Models from the Hub are not downloaded yet; the
                loader checks those.
        """
        del hf_config, revision
        if Path(model_name).is_dir():
            open_checkpoint(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.module_names = hf_to_vllm_mapper.apply_dict(self.module_names)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; None (embeddings, attention, experts) means vLLM's default."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from svdserve.server.plugin.linear import LowRankLinearMethod
        from svdserve.server.plugin.loader import require_supported_load_format

        if not isinstance(layer, LinearBase):
            return None
        require_supported_load_format()
        parts = self.parts(prefix)
        return LowRankLinearMethod(prefix, parts) if parts else UnquantizedLinearMethod()

    def parts(self, prefix: str) -> tuple[LayerPart, ...]:
        """The parts of the vLLM layer ``prefix`` in the order of its outputs.

        None if all of it is dense in the model's dtype.
        """
        if prefix in self.module_names:
            return (self._listed(prefix),)
        parent, _, last = prefix.rpartition(".")
        members = self.packed_modules_mapping.get(last) or _MERGED.get(last, ())
        linears = [f"{parent}.{member}" if parent else member for member in members]
        listed = [linear for linear in linears if linear in self.module_names]
        if not listed:
            return ()
        checkpoint_parent = self.module_names[listed[0]].rpartition(".")[0]
        parts: list[LayerPart] = []
        for member, linear in zip(members, linears, strict=True):
            name = f"{checkpoint_parent}.{member}" if checkpoint_parent else member
            part = self._listed(linear) if linear in self.module_names else LayerPart((name,), None)
            before = parts[-1] if parts else None
            if before and before.spec is part.spec is None and before.codec is part.codec:
                # Side by side: one product serves both.
                parts[-1] = replace(before, names=(*before.names, *part.names))
            else:
                parts.append(part)
        return tuple(parts)

    def _listed(self, module: str) -> LayerPart:
        """The part of a factored module or an encoded linear."""
        name = self.module_names[module]
        spec = self.checkpoint.modules.get(name)
        codec = (spec or self.checkpoint.linears[name]).codec
        return LayerPart((name,), spec, get_codec(codec))
