"""Models as they are found: heads, names, damage, code of their own, unsupported kinds."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)
from typer.testing import CliRunner

from models import VOCABULARY, build_model, random_tokens, save_model, save_tokenizer
from svdserve.cli.main import app
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.model.loading import load_model
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import make_recipe, make_run
from svdserve.compression.system.errors import UserError

SVD = make_recipe(method="svd", allocator="uniform", keep=0.7)


def small(model: Path, out: Path) -> Path:
    compress(str(model), out, SVD, make_run(progress=False))
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("loading") / "llama")


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def configured(directory: Path, **changes: Any) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def copied(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    return configured(target, **changes)


# Heads


def test_a_missing_head_is_not_the_embedding(llama: Path, tmp_path: Path) -> None:
    bare = copied(llama, tmp_path / "bare", tie_word_embeddings=False)
    for use in (Skeleton, load_model):
        with pytest.raises(
            UserError, match=r"lm_head.weight .*output head|output head.*lm_head.weight"
        ):
            use(bare)


def test_a_reward_model_is_refused(tmp_path: Path) -> None:
    config = build_model("llama").config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    for use in (Skeleton, load_model):
        with pytest.raises(UserError, match="output head"):
            use(tmp_path)


def test_eval_refuses_weights_that_would_be_random(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    torn = changed(llama, tmp_path / "torn", lambda tensors: tensors.__delitem__(name))
    with pytest.raises(UserError, match=f"{re.escape(name)} is missing"):
        load_model(torn)


# Names


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def base_names(llama: Path) -> Path:
    return changed(llama, llama.with_name("base"), without_prefix)


def test_names_of_the_base_model_compress_to_the_same(
    llama: Path, base_names: Path, tmp_path: Path
) -> None:
    first, second = small(llama, tmp_path / "a"), small(base_names, tmp_path / "b")
    tensors = [load_file(path / "model.safetensors") for path in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        dense = [load_model(path, "float32")(tokens).logits for path in (llama, base_names)]
    assert torch.equal(*dense)


def test_compressed_models_load_with_and_without_a_head(llama: Path, tmp_path: Path) -> None:
    directory, tokens = small(llama, tmp_path / "small"), random_tokens(2, 16)
    checkpoint, twin = open_checkpoint(directory), build_model("llama")
    for name, spec in checkpoint.config.modules.items():
        parts = checkpoint.factors(name).dense(torch.float32).split(spec.out_features)
        for member, part in zip(spec.members, parts, strict=True):
            linear = twin.get_submodule(f"{name.rpartition('.')[0]}.{member}")
            linear.weight.data.copy_(part)
    with torch.no_grad():
        states, logits = twin.model(tokens).last_hidden_state, twin(tokens).logits
        base = AutoModel.from_pretrained(directory)
        torch.testing.assert_close(base(tokens).last_hidden_state, states, rtol=1e-4, atol=1e-4)
        base.save_pretrained(tmp_path / "base")
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "base" / file).exists()
        again = AutoModel.from_pretrained(tmp_path / "base")
        torch.testing.assert_close(again(tokens).last_hidden_state, states, rtol=1e-4, atol=1e-4)
        headed = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.testing.assert_close(headed(tokens).logits, logits, rtol=1e-4, atol=1e-4)


# Weights


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_damaged_weights_are_named_before_anything_is_sampled(
    name: str, llama: Path, tmp_path: Path
) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 3] = torch.nan

    damaged = changed(llama, tmp_path / "damaged", damage)
    recipe = make_recipe(tokens=64, seq_len=32)
    with pytest.raises(UserError, match=f"{re.escape(name)}: holds inf or nan"):
        compress(str(damaged), tmp_path / "out", recipe, make_run(progress=False))


def test_no_quantization_is_no_quantization(llama: Path, tmp_path: Path) -> None:
    model = copied(llama, tmp_path / "null", quantization_config=None)
    small(model, tmp_path / "out")
    load_model(model)
    load_model(tmp_path / "out")


def test_a_number_of_experts_that_a_dense_model_does_not_read(llama: Path, tmp_path: Path) -> None:
    Skeleton(copied(llama, tmp_path / "dense", num_experts=16384))


# Other kinds of models

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
LAYERS = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}


def causal(kind: str, **changes: Any) -> torch.nn.Module:
    config = CONFIG_MAPPING[kind](**SIZES | changes)
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def nested(kind: str) -> torch.nn.Module:
    text = {**SIZES, "model_type": "gemma3_text" if kind == "gemma3" else "llama"}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config)  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "qwen2_moe": (lambda: causal("qwen2_moe", **EXPERTS), "as mixtures of experts do"),
    "gemma3": (lambda: nested("gemma3"), "multimodal model whose language model is nested"),
    "llava": (lambda: nested("llava"), "multimodal model whose language model is nested"),
    "gemma3n": (
        lambda: causal("gemma3n_text", **LAYERS, laurel_rank=4, num_kv_shared_layers=0),
        "reads the tokens themselves",
    ),
    "gpt2": (lambda: causal("gpt2"), "architecture 'gpt2' is not supported"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_kinds_are_told_truly(kind: str, tmp_path: Path) -> None:
    build, message = REFUSED[kind]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    recipe = make_recipe(tokens=64, seq_len=32)
    with pytest.raises(UserError, match=message) as caught:
        compress(str(tmp_path / "model"), tmp_path / "out", recipe, make_run(progress=False))
    assert "\n" not in str(caught.value)


# Custom code

CONFIGURATION = """
from transformers import LlamaConfig
class MineConfig(LlamaConfig):
    model_type = "mine"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def custom(llama: Path, tmp_path: Path) -> Path:
    names = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    }
    directory = copied(llama, tmp_path / "custom", model_type="mine", auto_map=names)
    (directory / "configuration_mine.py").write_text(CONFIGURATION)
    (directory / "modeling_mine.py").write_text(MODELING)
    return directory


def test_custom_code_runs_only_where_it_is_trusted(
    custom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked on the terminal"))
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 40)
    out, runner = tmp_path / "out", CliRunner()
    make = ["compress", str(custom), "--out", str(out), "--tokens", "64", "--seq-len", "32"]
    measure = ["eval", str(custom), str(out), "--text", str(text), "--seq-len", "32"]
    for command in (make, measure[:2] + measure[3:]):
        refused = runner.invoke(app, command)
        assert isinstance(refused.exception, UserError)
        assert "--trust-remote-code" in str(refused.exception)
    for command in (make, measure):
        trusted = runner.invoke(app, [*command, "--trust-remote-code"])
        assert trusted.exit_code == 0, trusted.output
    assert type(open_checkpoint(out)).__name__ == "Checkpoint"
