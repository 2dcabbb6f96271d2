"""How transformers builds a model: which class, which attention, and what it says when it cannot.

Everything that builds a model for compression or evaluation asks here, so that all of them compute
attention as the model means it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from svdserve.compression.errors import UserError
from svdserve.compression.permissions import remote_code

_SMALLEST_VOCABULARY = 256  # the bytes


def load_config(directory: Path) -> Any:
    """The transformers configuration of a model directory.

    Raises:
        UserError: transformers cannot read it, or it needs code that is not trusted.
    """
    with transformers_says(directory, "read config.json"):
        return AutoConfig.from_pretrained(directory, local_files_only=True, **remote_code())


def build(directory: Path, config: Any) -> nn.Module:
    """The causal language model of a configuration, in evaluation mode, in float32.

    With the attention that computes what the model means, and parameters that have no values yet;
    inside ``parameters_on_meta`` they take no memory.

    Raises:
        UserError: it is no causal language model, or transformers cannot build it.
    """
    _require_causal(directory, config)
    with transformers_says(directory, "build the model"):
        try:
            model = _build(config, "sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            return _build(config, "eager")
        return _build(config, "eager") if _beyond_sdpa(model) else model


def attention_of(directory: Path) -> str:
    """``sdpa`` or ``eager``: the implementation of attention that computes what the model means.

    Raises:
        UserError: as ``build``.
    """
    with parameters_on_meta():
        model = build(directory, load_config(directory))
    return str(model.config._attn_implementation)  # type: ignore[union-attr]


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        UserError: it has none, or transformers cannot load it.
    """
    with transformers_says(directory, "load the tokenizer"):
        if not any(_is_tokenizer(path.name) for path in directory.iterdir()):
            raise _without_tokenizer(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, **remote_code())
        # Some classes of transformers make an empty tokenizer where the vocabulary is missing.
        files = tokenizer.vocab_files_names.values()
        found = not files or any((directory / name).exists() for name in files)
        if not found and len(tokenizer.get_vocab()) < _SMALLEST_VOCABULARY:
            raise _without_tokenizer(directory)
    return tokenizer


def starts_with_bos(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts before every text, or none."""
    ids = tokenizer("").input_ids
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []


def embedding_rows(config: Any) -> int | None:
    """How many token ids a model has an embedding for, where its configuration says so."""
    rows = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def check_ids(directory: Path, config: Any, ids: torch.Tensor, text: object) -> None:
    """Raise UserError where a text has tokens that the model's embedding has no row for."""
    rows, largest = embedding_rows(config), int(ids.max())
    if rows is not None and largest >= rows:
        raise UserError(
            f"{text}: has the token id {largest}, and the model has embeddings for {rows} ids: "
            f"tokens were added to the tokenizer of {directory} and the model was not resized; "
            "take them out, or resize the model's embeddings"
        )


def _without_tokenizer(directory: Path) -> UserError:
    return UserError(
        f"{directory}: has no tokenizer, such as tokenizer.json or tokenizer.model; copy the "
        "tokenizer's files of the original model there"
    )


def _is_tokenizer(name: str) -> bool:
    known = ("vocab", "merges.txt", "spiece", "sentencepiece", "tekken.json", "tokenization")
    return name.startswith(("tokenizer", *known)) or name.endswith((".tiktoken", ".spm"))


def _build(config: Any, attention: str) -> nn.Module:
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32, **remote_code()
    )
    return model.eval()  # type: ignore[no-any-return]


def _beyond_sdpa(model: nn.Module) -> bool:
    """Whether attention has what the function of ``sdpa`` in transformers passes over.

    These are caps of the attention's logits (Gemma 2) and sinks (gpt-oss).
    """
    for module in model.modules():
        fields = vars(module)
        capped = any("softcap" in name and fields[name] is not None for name in fields)
        if capped or "sinks" in module._parameters:
            return True
    return False


def _require_causal(directory: Path, config: Any) -> None:
    kind = str(config.model_type)
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or custom:
        return
    if getattr(config, "text_config", None) is not None:
        raise UserError(
            f"{directory}: architecture {kind!r} is not supported: it is a multimodal model whose "
            "language model is nested in it; give the language model as a directory of its own"
        )
    raise UserError(
        f"{directory}: architecture {kind!r} is not supported: transformers has no causal language "
        "model of this type; give a decoder-only language model"
    )


@contextmanager
def transformers_says(directory: Path, step: str) -> Iterator[None]:
    """Turn whatever transformers or a model's own code raises into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join((str(error).splitlines() or [""])[0].split()) or type(error).__name__
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{directory}: needs Python code that is not part of transformers; read it, and "
                "add --trust-remote-code if you trust it"
            ) from None
        raise UserError(
            f"{directory}: transformers cannot {step}: {text}; check that the files are complete "
            "and that this transformers knows the model"
        ) from None


@contextmanager
def foreign_code(architecture: str, step: str) -> Iterator[None]:
    """Turn what a model's own code raises while it is traced into one line.

    Raises:
        UserError: names the architecture, the step and the reason.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        text = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"architecture {architecture!r} is not supported: {step}: {text}; give a model whose "
            "blocks run one after the other on hidden states [B, L, d]"
        ) from None


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters made inside are moved to meta at once; buffers (rotary tables) stay real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
