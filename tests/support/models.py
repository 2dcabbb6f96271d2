"""Pico models: every supported architecture at a size that runs in milliseconds.

Weights are random but scaled so that the logits depend visibly on every layer; a tokenizer of
bytes makes each directory complete for transformers and for vLLM.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 512
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_COMMON, head_dim=32, tie_word_embeddings=True),
    "mistral": MistralConfig(**_COMMON, head_dim=32, sliding_window=16, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**_COMMON, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_COMMON, head_dim=32, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(
        **_COMMON,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
ARCHITECTURES = tuple(CONFIGS)


def build_model(architecture: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random float32 model of one architecture; ``changes`` override its configuration."""
    config = type(CONFIGS[architecture])(**{**CONFIGS[architecture].to_dict(), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model  # type: ignore[no-any-return]


def save_model(
    architecture: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write a pico model and its tokenizer as a Hugging Face directory."""
    build_model(architecture, **changes).to(dtype).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """Write a tokenizer of bytes with ``VOCABULARY`` entries."""
    # Bytes as tokens: what every tokenizer class that transformers may pick can read.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", "<unk>", *alphabet]
    words += [f"<unused{i}>" for i in range(len(words), VOCABULARY)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(directory)


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length] that avoid the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (rows, length), generator=generator)


def hidden_states(model: torch.nn.Module, layers: str, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Output of every block in the model's own forward pass."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in model.get_submodule(layers)
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen
