"""Attention is the model's own: soft caps and sinks count, in compression and in evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    VaultGemmaConfig,
)

from models import VOCABULARY, hidden_states, random_tokens, save_tokenizer
from svdserve.compression.model.loading import load_model
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import make_recipe, make_run
from svdserve.compression.pipeline.walk.walk import Walk

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
    "tie_word_embeddings": True,
}
CAPPED = {"query_pre_attn_scalar": 1, "attn_logit_softcapping": 5.0, "sliding_window": 16}
CONFIGS = {
    "gemma2": Gemma2Config(**SIZES, **CAPPED),
    "vaultgemma": VaultGemmaConfig(**SIZES, **CAPPED),
    "granite_swa": CONFIG_MAPPING["granite_swa"](**SIZES, sliding_window=16),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("attention")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.save_pretrained(root / name)
        save_tokenizer(root / name)
    return {name: root / name for name in CONFIGS}


def eager(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_walk_and_evaluation_are_the_models_own_eager_forward(
    name: str, models: dict[str, Path]
) -> None:
    tokens, model = random_tokens(3, 40), eager(models[name])
    cpu = torch.device("cpu")
    wanted = frozenset({"gram", "shift"})
    walk = Walk(Skeleton(models[name]), tokens, wanted, torch.float32, cpu, batch_size=2)
    expected = hidden_states(model, walk.skeleton.layers_name, tokens)
    for index in range(walk.skeleton.blocks):
        block = walk.block(index)
        for group in block.groups:
            block.statistics(group)
        block.finish()
        for stream in ("student", "teacher"):
            states = walk.streams.read(stream, slice(None))
            torch.testing.assert_close(states, expected[index], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        logits = load_model(models[name], "float32")(tokens).logits
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_compresses_with_gradients_and_loads(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = make_recipe(tokens=64, seq_len=32, keep=0.7)
    compress(str(models[name]), tmp_path / "out", recipe, make_run(progress=False))
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        expected = eager(tmp_path / "out")(tokens).logits
        got = load_model(tmp_path / "out", "float32")(tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_sdpa_stays_where_it_computes_the_same(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    assert Skeleton(tmp_path).model.config._attn_implementation == "sdpa"
    assert load_model(tmp_path).config._attn_implementation == "sdpa"
