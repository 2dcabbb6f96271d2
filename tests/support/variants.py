"""Model directories as people have them, each made from one pico model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from models import save_model

Tensors = dict[str, torch.Tensor]


def make_variants(root: Path) -> dict[str, Path]:
    """Every variant's directory under ``root``, by its name; "pico" is the healthy one."""
    pico = save_model("llama", root / "pico", num_hidden_layers=2)
    made = {"pico": pico}

    def new(name: str, change: Callable[[Path], None]) -> None:
        made[name] = shutil.copytree(pico, root / name)
        change(made[name])

    for name, changed in _TENSORS.items():
        new(name, lambda directory, changed=changed: _rewrite(directory, changed))
    for name, fields in _CONFIGS.items():
        new(name, lambda directory, fields=fields: _configure(directory, **fields))
    new("float64", _as_float64)
    new("norms-float32", _norms_float32)
    new("no-tokenizer", lambda d: [file.unlink() for file in d.glob("tokenizer*")] and None)
    new("damaged-tokenizer", lambda d: (d / "tokenizer.json").write_text("{") and None)
    new("added-tokens", _add_tokens)
    new("several-templates", _add_templates)
    new("generation-config", _generation_config)
    new("licence", _licence)
    return made


def _configure(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _rewrite(directory: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})


def _zero(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            tensors[name].zero_()

    return change


def _not_finite(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][3, 3] = value

    return change


def _rank_one(tensors: Tensors) -> None:
    for name, weight in tensors.items():
        if "proj" in name:
            tensors[name] = torch.outer(weight[:, 0], weight[0])


def _dead_channels(tensors: Tensors) -> None:
    for name, weight in tensors.items():
        if "proj" in name:
            weight[5:20] = 0
            weight[:, 7:30] = 0


def _base_names(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _as_float64(directory: Path) -> None:
    _rewrite(directory, lambda tensors: {n: t.double() for n, t in tensors.items()})
    _configure(directory, dtype="float64")


def _norms_float32(directory: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}

    _rewrite(directory, change)
    _configure(directory, dtype="bfloat16")


def _add_tokens(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<|extra|>", "the "])
    tokenizer.save_pretrained(directory)


def _add_templates(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    first = "{{messages[0]['content']}}"
    tokenizer.chat_template = {"default": first, "rag": f"RAG {first}"}
    tokenizer.save_pretrained(directory)


def _generation_config(directory: Path) -> None:
    fields = {
        "eos_token_id": 2,
        "max_new_tokens": 20,
        "repetition_penalty": 1.3,
        "num_beams": 2,
        "num_return_sequences": 2,
        "suppress_tokens": [40, 41],
        "stop_strings": ["a"],
        "temperature": 0.2,
        "top_k": 3,
    }
    (directory / "generation_config.json").write_text(json.dumps(fields))


def _licence(directory: Path) -> None:
    (directory / "LICENSE").write_text("A community licence")
    (directory / "NOTICE").write_text("A notice")
    (directory / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\nText")


_TENSORS: dict[str, Callable[[Tensors], Tensors | None]] = {
    "zero-middle": _zero(
        "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"
    ),
    "zero-last": _zero("model.layers.1.mlp.down_proj.weight"),
    "zero-embedding": _zero("model.embed_tokens.weight"),
    "rank-one": _rank_one,
    "dead-channels": _dead_channels,
    "nan-weight": _not_finite("model.layers.1.mlp.up_proj.weight", float("nan")),
    "inf-embedding": _not_finite("model.embed_tokens.weight", float("inf")),
    "base-model-names": _base_names,
}
_CONFIGS: dict[str, dict[str, object]] = {
    "quantization-null": {"quantization_config": None},
    "quantization-junk": {"quantization_config": "awq"},
    "untied-without-head": {"tie_word_embeddings": False},
    "custom-code": {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    },
    "unknown-type": {"model_type": "no-such-model"},
}
