"""Models are computed as they mean it; what cannot be compressed is refused in one true line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3nTextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaForSequenceClassification,
    Qwen2MoeConfig,
    VaultGemmaConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models import build_model, random_tokens, save_model
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.model.building import attention_of
from svdserve.compression.model.loading import load_model
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Run, make_recipe
from svdserve.compression.system import permissions
from svdserve.compression.system.errors import UserError

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QUIET = Run(progress=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("tokenizer") / "llama")


def saved(
    config: Any, directory: Path, tokenizer: Path, scale: float = 1.0, auto: Any = None
) -> Path:
    torch.manual_seed(0)
    model = (auto or AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=scale * parameter.shape[1] ** -0.5)
    model.save_pretrained(directory)
    for file in tokenizer.glob("tok*"):
        shutil.copy(file, directory)
    return directory


@pytest.mark.parametrize("config", [Gemma2Config, VaultGemmaConfig])
def test_caps_of_attention_are_kept(config: Any, tokenizer: Path, tmp_path: Path) -> None:
    """Weights are so large that the cap decides: SDPA is off by more than a nat here."""
    options = {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 4}
    directory = saved(config(**COMMON, **options), tmp_path / "model", tokenizer, scale=3.0)
    assert attention_of(directory) == "eager"
    tokens = random_tokens(2, 24)
    kinds = {
        name: AutoModelForCausalLM.from_pretrained(directory, attn_implementation=name).eval()
        for name in ("eager", "sdpa")
    }
    with torch.no_grad():
        expected, other = (kinds[name](tokens).logits for name in ("eager", "sdpa"))
        assert float((expected - other).abs().max()) > 0.1
        torch.testing.assert_close(load_model(directory)(tokens).logits, expected)
        torch.testing.assert_close(_through_the_blocks(directory, tokens), expected)
    compress(str(directory), tmp_path / "out", make_recipe(tokens=64, seq_len=32), QUIET)
    check_finite(open_checkpoint(tmp_path / "out"))


def _through_the_blocks(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits by the skeleton's embedding, blocks and head, as the walk runs them."""
    skeleton, device = Skeleton(directory), torch.device("cpu")
    ((hidden, calls),) = skeleton.embed([tokens], device)
    for index in range(skeleton.blocks):
        args, kwargs = calls[index]
        output = skeleton.block(index, device)(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
    with skeleton.head(device) as predict:
        return predict(hidden)


def test_plain_models_keep_sdpa(tokenizer: Path) -> None:
    assert attention_of(tokenizer) == "sdpa"


def test_linears_that_see_flattened_tokens_are_factored(tokenizer: Path, tmp_path: Path) -> None:
    config = Llama4TextConfig(
        **COMMON, intermediate_size_mlp=256, num_local_experts=2, interleave_moe_layer_step=2
    )
    directory = saved(config, tmp_path / "model", tokenizer)
    compress(str(directory), tmp_path / "out", make_recipe(tokens=64, seq_len=32), QUIET)
    modules = open_checkpoint(tmp_path / "out").config.modules
    assert any("shared_expert" in name for name in modules)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "qwen2_moe": (
        lambda: Qwen2MoeConfig(**COMMON, **EXPERTS, shared_expert_intermediate_size=64),
        r"'qwen2_moe' is not supported: it calls .*experts.* mixtures of experts",
    ),
    "gpt_oss": (
        lambda: GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
        "'gpt_oss' is not supported: block 0 has 0 modules with the linears gate_proj, up_proj",
    ),
    "gemma3n": (
        lambda: Gemma3nTextConfig(
            **COMMON,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=512,
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "'gemma3n_text' is not supported",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_supported_is_said_truly(name: str, tokenizer: Path, tmp_path: Path) -> None:
    config, message = REFUSALS[name]
    directory = saved(config(), tmp_path / "model", tokenizer)
    with pytest.raises(UserError, match=message) as refusal:
        compress(str(directory), tmp_path / "out", make_recipe(tokens=64, seq_len=32), QUIET)
    assert "missing" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_nested_language_model_is_named_as_one(tokenizer: Path, tmp_path: Path) -> None:
    config = CONFIG_MAPPING["mistral3"](text_config={"model_type": "mistral", **COMMON})
    directory = shutil.copytree(tokenizer, tmp_path / "model")
    config.save_pretrained(directory)
    with pytest.raises(UserError, match=r"'mistral3' is not supported: .* nested"):
        Skeleton(directory)


def test_a_reward_model_has_no_head(tokenizer: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    causal = build_model("llama", tie_word_embeddings=False)
    LlamaForSequenceClassification(causal.config).save_pretrained(directory)
    for file in tokenizer.glob("tok*"):
        shutil.copy(file, directory)
    with pytest.raises(UserError, match=r"has no output head: lm_head\.weight"):
        compress(str(directory), tmp_path / "out", make_recipe(tokens=64, seq_len=32), QUIET)
    with pytest.raises(UserError, match="without output head"):
        load_model(directory)


MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_of_a_model_runs_only_when_trusted(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(tokenizer, tmp_path / "model")
    (directory / "modeling_mine.py").write_text(MODELING)
    config = json.loads((directory / "config.json").read_text())
    code = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
    fields = config | {"model_type": "mine", "architectures": ["Mine"], "auto_map": code}
    (directory / "config.json").write_text(json.dumps(fields))
    monkeypatch.setenv(permissions.REMOTE_CODE, "0")
    recipe = make_recipe(tokens=64, seq_len=32)
    with pytest.raises(UserError, match="read it, and add --trust-remote-code"):
        compress(str(directory), tmp_path / "out", recipe, QUIET)
    monkeypatch.setenv(permissions.REMOTE_CODE, "1")
    compress(str(directory), tmp_path / "out", recipe, QUIET)
    check_finite(open_checkpoint(tmp_path / "out"))
