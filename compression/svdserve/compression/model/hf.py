"""The transformers quantizer plug-in, with which ``from_pretrained`` loads svdserve checkpoints.

Importing this module registers the plug-in. hook.py imports it when transformers loads its
quantizers, so ``AutoModelForCausalLM.from_pretrained(DIR)`` works after
``import svdserve.compression``, without trust_remote_code. ``AutoModel`` and other heads over the
same base model work too.

transformers or its caller chooses the attention. By default that is sdpa, which ignores the soft
cap of attention that some models have (Gemma 2): pass ``attn_implementation="eager"`` for those, as
loading.py does.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from svdserve.compression.format.codecs import get_codec
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.schema import QUANT_METHOD, CheckpointConfig, parse_config
from svdserve.compression.model.modules import EncodedLinear, replace_group
from svdserve.compression.system.errors import UserError


@register_quantization_config(QUANT_METHOD)
class SvdserveConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """transformers' form of the ``quantization_config`` block; UserError if it is malformed."""

    def __init__(self, **block: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.checkpoint = parse_config({"quant_method": QUANT_METHOD, **block})

    def to_dict(self) -> dict[str, Any]:
        """The block as config.json has it, so that ``save_pretrained`` writes it unchanged."""
        return self.checkpoint.dump()


@register_quantizer(QUANT_METHOD)
class SvdserveQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces linears by factored modules before transformers loads the weights.

    The checkpoint is validated while the model is still on the meta device, so a broken checkpoint
    raises UserError before memory is allocated. Factors of a plain codec can be trained like any
    other parameters.
    """

    quantization_config: SvdserveConfig

    @property
    def is_trainable(self) -> bool:
        config = self.quantization_config.checkpoint
        plain = all(get_codec(spec.codec).plain for spec in config.modules.values())
        return plain and not config.encoded_linears

    @property
    def is_qat_trainable(self) -> bool:
        return self.is_trainable

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if not self.pre_quantized:
            raise UserError(
                "svdserve cannot compress a model while transformers loads it; run `svdserve "
                "compress MODEL --out DIR` and load DIR"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config: CheckpointConfig = self.quantization_config.checkpoint
        dtype = torch.get_default_dtype() if model.dtype is None else model.dtype
        if checkpoint_files:
            checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
            if {Path(file) for file in checkpoint_files} != set(checkpoint.files.paths):
                raise UserError(
                    f"{checkpoint.directory}: transformers chose {checkpoint_files}, which are not "
                    "the checkpoint's files; omit the arguments variant and gguf_file"
                )
            check_finite(checkpoint)
        # Use the model's own names from here on, so that save_pretrained writes consistent names.
        config = self.quantization_config.checkpoint = config.model_copy(
            update={
                "modules": {_own(model, n): spec for n, spec in config.modules.items()},
                "linears": {_own(model, n): spec for n, spec in config.linears.items()},
            }
        )
        for name, spec in config.modules.items():
            parent, leaf = _parent(model, name)
            replace_group(parent, leaf, spec, None, dtype, "meta")
        for name, linear in config.encoded_linears.items():
            parent, leaf = _parent(model, name)
            old = getattr(parent, leaf, None)
            if not isinstance(old, nn.Linear):
                raise UserError(
                    f"config.json: linears: {name} is no linear of {type(model).__name__}; "
                    "config.json does not belong to this model"
                )
            sizes = old.in_features, old.out_features
            setattr(parent, leaf, EncodedLinear(*sizes, linear, old.bias, dtype, "meta"))


def _own(model: Any, name: str) -> str:
    """The model's own name for a module of the checkpoint.

    The names in a base model (``AutoModel``), and in what it has saved, lack the prefix that they
    have in a model with a head.
    """
    prefix = f"{model.base_model_prefix}."
    for other in (name, name.removeprefix(prefix), prefix + name):
        with suppress(AttributeError):
            model.get_submodule(other.rpartition(".")[0])
            return other
    parent = name.rpartition(".")[0]
    raise UserError(
        f"config.json: module {name}: {type(model).__name__} has no {parent}; config.json does not "
        "belong to this model"
    )


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds ``name``, and the last part of the name."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf
