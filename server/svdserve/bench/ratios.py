"""The bytes ratio and the operations ratio of two models, which limit the ratio of their speeds.

Decoding a small batch is limited by its bytes: a step reads every weight of the blocks, the output
head and the KV cache of every sequence once. Prefill is limited by its operations. Both are counted
from the configuration and the safetensors headers; activations, norms and sampling are left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdserve.compression.format.tensors import TensorFiles
from svdserve.compression.format.untrusted import read_json

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")


@dataclass(frozen=True)
class StepWork:
    """Bytes that a step reads, and its floating-point operations (a multiply-add counts two)."""

    bytes: int
    operations: int

    def bytes_ratio(self, dense: "StepWork") -> float:
        """The dense model's bytes over this model's: the speed-up of decoding that they allow."""
        return dense.bytes / self.bytes

    def operations_ratio(self, dense: "StepWork") -> float:
        """The dense model's operations over this model's: the speed-up that they allow prefill."""
        return dense.operations / self.operations


@dataclass(frozen=True)
class ModelWork:
    """The sizes of one model that decide the work of its steps.

    Attributes:
        linear_bytes, linear_parameters: of the blocks' weights, factored or dense, biases included.
        head_bytes, head_parameters: of the output head, which may be the embedding.
        kv_bytes: of the keys and values of one token in all layers.
        attention_width: query heads times head size, summed over the layers.
    """

    linear_bytes: int
    linear_parameters: int
    head_bytes: int
    head_parameters: int
    kv_bytes: int
    attention_width: int

    def decode(self, batch: int, context: int) -> StepWork:
        """The work of decoding one token for each of ``batch`` sequences of ``context`` tokens."""
        read = self.linear_bytes + self.head_bytes + batch * context * self.kv_bytes
        products = self.linear_parameters + self.head_parameters
        attention = 2 * context * self.attention_width
        return StepWork(read, 2 * batch * (products + attention))

    def prefill(self, length: int) -> StepWork:
        """The work of one prompt of ``length`` tokens, with the logits of its last token."""
        read = self.linear_bytes + self.head_bytes + length * self.kv_bytes
        attention = length * (length + 1) * self.attention_width  # causal: half of the square
        products = length * self.linear_parameters + self.head_parameters
        return StepWork(read, 2 * (products + attention))


def model_work(directory: Path, dtype: torch.dtype | None = None) -> ModelWork:
    """Measure a model, dense or compressed, from its files.

    Args:
        directory: of safetensors and config.json.
        dtype: in which the engine holds floating-point weights and the KV cache; None means the
            dtype of the files.

    Raises:
        UserError: the directory cannot be read.
    """
    config = read_json(directory / "config.json")
    info = TensorFiles(directory).info
    embedding = next((name for name in info if name.endswith(_EMBEDDINGS)), None)
    head = next((name for name in info if name.endswith(_HEADS)), embedding)
    assert head is not None, f"{directory} has no embedding"

    def held(name: str) -> int:
        stored = info[name].dtype
        itemsize = (dtype if dtype and stored.is_floating_point else stored).itemsize
        return torch.Size(info[name].shape).numel() * itemsize

    blocks = [name for name in info if name not in (embedding, head)]
    products = [n for n in blocks if len(info[n].shape) == 2 and not n.endswith("_scale")]
    in_word = _weights_in_word(config)
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    layers = config["num_hidden_layers"]
    kv_heads = config.get("num_key_value_heads") or heads
    return ModelWork(
        linear_bytes=sum(map(held, blocks)),
        linear_parameters=sum(
            torch.Size(info[name].shape).numel() * (in_word if name.endswith("_packed") else 1)
            for name in products
        ),
        head_bytes=held(head),
        head_parameters=torch.Size(info[head].shape).numel(),
        kv_bytes=2 * layers * kv_heads * size * (dtype or info[head].dtype).itemsize,
        attention_width=layers * heads * size,
    )


def _weights_in_word(config: dict[str, Any]) -> int:
    """How many weights compressed-tensors packs into 32 bits (``weight_packed``)."""
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    bits = [(group.get("weights") or {}).get("num_bits") for group in groups.values()]
    return 32 // next(filter(None, bits), 32)
