"""Loading whole transformers models, dense or compressed, for evaluation and training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

import svdserve.compression.model.hf  # noqa: F401 (registers the quantizer)
from svdserve.compression.format.reader import is_checkpoint, open_checkpoint
from svdserve.compression.format.tensors import TensorFiles
from svdserve.compression.model.building import (
    attention_of,
    require_language_head,
    transformers_says,
)
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.permissions import remote_code

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(model_dir: Path, dtype: str = "auto", device: str = "cpu") -> Any:
    """The transformers model of a dense or compressed directory, in evaluation mode.

    Raises:
        UserError: transformers cannot load the model, a weight is missing, or ``open_checkpoint``
            refuses the checkpoint.
    """
    if is_checkpoint(model_dir):
        open_checkpoint(model_dir)
    else:
        TensorFiles(model_dir)
    chosen = DTYPES.get(dtype, "auto")
    attention = attention_of(model_dir)
    with transformers_says(model_dir, "load the model"):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=chosen,
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
            **remote_code(),
        )
    _require_loaded(model_dir, loaded)
    require_language_head(model_dir, model.config)
    return model.eval().to(device)


def _require_loaded(model_dir: Path, loaded: dict[str, Any]) -> None:
    """Raise UserError for missing weights, which transformers fills with random numbers."""
    wrong = [*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"{model_dir}: {sorted(wrong)[0]} is missing from the files or has another size, as in "
            "a model without output head (a reward or embedding model); give a complete causal "
            "language model"
        )


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [B, L, V] of final hidden states [B, L, d].

    Runs the model's own forward with its decoder skipped, so that soft-capping and scaling of the
    logits are applied as the model defines them.
    """
    output = BaseModelOutputWithPast(last_hidden_state=hidden)
    decoder = model.base_model
    decoder.forward = lambda *_args, **_kwargs: output
    try:
        logits = model(inputs_embeds=hidden, use_cache=False).logits
    finally:
        del decoder.forward
    assert isinstance(logits, Tensor)
    return logits
