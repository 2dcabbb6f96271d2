"""Building models and tokenizers with transformers: attention implementation and error messages.

Compression and evaluation both build their models here, so that both compute the attention that the
model defines.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from svdserve.compression.system.errors import UserError
from svdserve.compression.system.permissions import remote_code

_SMALLEST_VOCABULARY = 256  # a vocabulary of single bytes
_PROBE = "svdserve_probe"
# Arguments that sdpa reads, that the mask already contains, or that only flash kernels read.
_TAKEN_IN = {"dropout", "scaling", "is_causal", "position_bias", "sliding_window", "position_ids"}
_TAKEN_IN |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cache_position"}
_NO_LANGUAGE_HEAD = ("Classification", "QuestionAnswering", "Reward")


def load_config(directory: Path) -> Any:
    """The transformers configuration of a model directory.

    Raises:
        UserError: transformers cannot read it, or it needs code that the user does not trust.
    """
    with transformers_says(directory, "read config.json"):
        return AutoConfig.from_pretrained(directory, local_files_only=True, **remote_code())


def build(directory: Path, config: Any) -> nn.Module:
    """The causal language model of a configuration, in evaluation mode, in float32.

    Uses the attention of ``attention_of``. The parameters have no meaningful values yet; inside
    accelerate's ``init_empty_weights`` they take no memory.

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
    """``sdpa``, or ``eager`` for models whose attention sdpa computes incompletely.

    Raises:
        UserError: as ``build``.
    """
    with init_empty_weights(include_buffers=False):
        model = build(directory, load_config(directory))
    return str(model.config._attn_implementation)  # type: ignore[union-attr]


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        UserError: the directory has no tokenizer, or transformers cannot load it.
    """
    with transformers_says(directory, "load the tokenizer"):
        if not any(_is_tokenizer(path.name) for path in directory.iterdir()):
            raise _without_tokenizer(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, **remote_code())
        # Some classes of transformers make an empty tokenizer if the vocabulary is missing.
        files = tokenizer.vocab_files_names.values()
        found = not files or any((directory / name).exists() for name in files)
        if not found and len(tokenizer.get_vocab()) < _SMALLEST_VOCABULARY:
            raise _without_tokenizer(directory)
    return tokenizer


def starts_with_bos(tokenizer: Any) -> list[int]:
    """The BOS token in a list if the tokenizer puts it before every text, else an empty list."""
    ids = tokenizer("").input_ids
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []


def embedding_rows(config: Any) -> int | None:
    """Number of token ids that have an embedding; None if the configuration does not say."""
    rows = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def check_ids(directory: Path, config: Any, ids: torch.Tensor, text: object) -> None:
    """Raise UserError if a text has token ids for which the model has no embedding.

    ``text`` names the text in the message.
    """
    rows, largest = embedding_rows(config), int(ids.max())
    if rows is not None and largest >= rows:
        raise UserError(
            f"{text}: has the token id {largest}, but the model has embeddings for {rows} ids: "
            f"tokens were added to the tokenizer of {directory} and the model was not resized; "
            "remove the tokens, or resize the model's embeddings"
        )


def _without_tokenizer(directory: Path) -> UserError:
    return UserError(
        f"{directory}: has no tokenizer, such as tokenizer.json or tokenizer.model; copy the "
        "original model's tokenizer files there"
    )


def _is_tokenizer(name: str) -> bool:
    known = ("vocab", "merges.txt", "spiece", "sentencepiece", "tekken.json", "tokenization")
    return name.startswith(("tokenizer", *known)) or name.endswith((".tiktoken", ".spm"))


def _build(config: Any, attention: str) -> nn.Module:
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32, **remote_code()
    )
    return model.eval()  # type: ignore[no-any-return]


def _beyond_sdpa(model: Any) -> bool:
    """Whether a model passes arguments to its attention that ``sdpa`` ignores.

    Such arguments are a cap of the logits (Gemma 2) or sinks. One run with fake tensors, which
    compute nothing, shows them.
    """
    chosen, ignored = model.config._attn_implementation, set[str]()
    if chosen != "sdpa":  # a model's own code may have chosen another implementation
        return False

    def probe(
        _module: nn.Module, query: Tensor, _key: Tensor, value: Tensor, *_: Any, **given: Any
    ) -> tuple[Tensor, None]:
        for name, item in given.items():
            number = isinstance(item, int | float) and not isinstance(item, bool)
            if name not in _TAKEN_IN and (number or isinstance(item, Tensor)):
                ignored.add(name)
        heads = query.transpose(1, 2)
        return heads.new_empty(*heads.shape[:-1], value.shape[-1]), None

    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    ALL_ATTENTION_FUNCTIONS.register(_PROBE, probe)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PROBE, eager_mask)
    try:
        model.set_attn_implementation(_PROBE)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            state = {
                # The grouped products of experts infer shapes for bfloat16 only.
                name: torch.empty(tensor.shape, dtype=_narrow(tensor.dtype))
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            }
            tokens = torch.zeros(1, 8, dtype=torch.int64)
            functional_call(model, state, (tokens,), {"use_cache": False})
    except Exception:
        pass  # judge by the calls so far; the real run will report the error
    finally:
        log.disabled = before
        model.set_attn_implementation(chosen)
    return bool(ignored)


def _narrow(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.is_floating_point else dtype


def nested(directory: Path, kind: str) -> UserError:
    return UserError(
        f"{directory}: architecture {kind!r} is not supported: it is a multimodal model whose "
        "language model is nested in it; give the language model as a directory of its own"
    )


def require_language_head(directory: Path, config: Any) -> None:
    """Raise UserError if config.json names a classifier or a reward model."""
    for name in getattr(config, "architectures", None) or ():
        if any(word in name for word in _NO_LANGUAGE_HEAD):
            raise UserError(
                f"{directory}: {name} has no output head over a vocabulary; give a causal language "
                "model, not a reward model or a classifier"
            )


def _require_causal(directory: Path, config: Any) -> None:
    kind = str(config.model_type)
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or custom:
        return
    if getattr(config, "text_config", None) is not None:
        raise nested(directory, kind)
    raise UserError(
        f"{directory}: architecture {kind!r} is not supported: transformers has no causal language "
        "model of this type; give a decoder-only language model"
    )


@contextmanager
def transformers_says(directory: Path, step: str) -> Iterator[None]:
    """Turn any error of transformers or of a model's own code into a UserError of one line.

    ``step`` completes the sentence "transformers cannot ...".
    """
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
def foreign_code(what: str, step: str) -> Iterator[None]:
    """Turn any error of a model's own code while it is traced into a UserError of one line.

    Raises:
        UserError: the code fails; the message begins with ``what``, such as "architecture 'gpt2'",
            and has ``step`` and the reason.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        text = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"{what} is not supported: {step}: {text}; give a model whose blocks run one after the "
            "other on hidden states [B, L, d]"
        ) from None
