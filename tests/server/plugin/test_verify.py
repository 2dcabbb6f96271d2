"""Every architecture that compress takes, served by vLLM: each layer and the logits are right.

Left out is DiffLlama, which vLLM does not serve dense either.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

from checkpoints import write_checkpoint
from models import random_tokens, save_model
from servers import BIN, ENVIRONMENT, FLAGS
from svdserve.compression.model.loading import load_model
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Run, make_recipe
from svdserve.server.layer_checks import VERIFY, LayerCheck, require_right
from svdserve.server.plugin import verify
from vllm_run import Served, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

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
# Without experts in any layer.
LLAMA4 = {
    "intermediate_size_mlp": 256,
    "num_local_experts": 2,
    "moe_layers": [],  # for transformers
    "interleave_moe_layer_step": 0,  # the same for vLLM
    "attn_temperature_tuning": False,
}
TYPES: dict[str, dict[str, Any]] = {
    "llama4_text": LLAMA4,
    "llama": {},
    "mistral": {},
    "ministral": {},
    "ministral3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "granite": {},
    "cohere": {},
    "cohere2": {},
    "cwm": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "vaultgemma": {},
    "granite_swa": {},
    "bitnet": {},
}


def pico(name: str, root: Path) -> Path:
    """A random model of one type with the tokenizer of the others."""
    known = CONFIG_MAPPING[name]
    fields = {k: v for k, v in COMMON.items() if k in known().to_dict()}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(known(**fields, **TYPES[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(root / name)
    for file in (root / "tokenizer").glob("tok*"):
        shutil.copy(file, root / name)
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("types")
    save_model("llama", root / "tokenizer")
    fields = {"method": "svd", "allocator": "uniform", "keep": 0.7}
    for name in TYPES:
        # vLLM runs BitNet by its Transformers backend, which merges no linears.
        grouping = "separate" if name == "bitnet" else "shared"
        recipe = make_recipe(**fields, grouping=grouping)
        compress(str(pico(name, root)), root / f"{name}-small", recipe, Run(progress=False))
    return root


PROMPTS = random_tokens(2, 24).tolist()


@pytest.fixture(scope="module")
def served(root: Path) -> dict[str, Served]:
    """A model of each type; "two" is llama4_text on two ranks, "joined" is stored in bfloat16."""
    engines = {name: {"model": str(root / f"{name}-small")} for name in TYPES}
    engines["two"] = {**engines["llama4_text"], "tensor_parallel_size": 2}
    dense = save_model("llama", root / "joined-dense", dtype=torch.bfloat16)
    fields = {"method": "svd", "allocator": "uniform", "keep": 0.7, "layout": "interpolative"}
    compress(str(dense), root / "joined", make_recipe(**fields), Run(progress=False))
    engines["joined"] = {"model": str(root / "joined"), "dtype": "bfloat16"}
    environment = {VERIFY: "1"}
    results = run(root / "run", list(engines.values()), PROMPTS, timeout=900, **environment)
    return dict(zip(engines, results, strict=True))


@pytest.mark.parametrize("name", TYPES)
def test_layers_and_logits_are_right(name: str, root: Path, served: dict[str, Served]) -> None:
    result = served[name]
    assert not result.error, result.error
    (report,) = result.reports
    assert report is not None
    checks = [LayerCheck(**check) for check in report["checks"]]
    assert len(checks) >= 8
    require_right(checks)
    model = load_model(root / f"{name}-small")
    for prompt, logprobs in zip(PROMPTS, result.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, :-1].float()
        expected = logits.log_softmax(dim=-1)
        torch.testing.assert_close(logprobs[: len(prompt) - 1], expected, atol=2e-4, rtol=1e-3)


def test_a_permuted_model_on_two_tp_ranks(served: dict[str, Served]) -> None:
    one, two = served["llama4_text"], served["two"]
    assert not two.error, two.error
    assert two.tokens == one.tokens
    assert len(two.reports) == 2
    for report in two.reports:
        assert report is not None
        require_right([LayerCheck(**check) for check in report["checks"]])


def test_joined_mlps_with_a_fused_activation(served: dict[str, Served]) -> None:
    """svdserve's bfloat16 kernel runs, where the processor has one."""
    result = served["joined"]
    assert not result.error, result.error
    (report,) = result.reports
    assert report is not None
    checks = [LayerCheck(**check) for check in report["checks"]]
    assert {check.name.rpartition(".")[2] for check in checks} == {
        *("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    }
    require_right(checks)


def test_one_wrong_channel_of_many_is_found() -> None:
    expected = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)).double()
    served = expected.clone()
    served[:, 7] = -served[:, 7]
    assert float((served - expected).norm() / expected.norm()) < 0.05
    assert verify._error(served, expected) > 0.2
    served[:, 7] = torch.nan
    assert verify._error(served, expected) == float("inf")


def test_a_wrong_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 factored layers .* b is off by 0\.5"):
        require_right([LayerCheck("a", 1e-6, 1e-3), LayerCheck("b", 0.5, 1e-3)])


def test_serving_refuses_a_wrong_layer(tmp_path: Path) -> None:
    """Factors whose large terms cancel: right in the files' float32, but not in bfloat16."""
    dense = save_model("llama", tmp_path / "dense")
    model = write_checkpoint(dense, tmp_path / "damaged", layout="pair", shared=True)
    file, module = model / "model.safetensors", "model.layers.1.self_attn.qkv_proj"
    tensors = load_file(file)
    inner, outer = (tensors[f"{module}.{name}"] for name in ("factor_in", "factor_out"))
    before = outer @ inner
    inner[0] += 3e3 * inner[1]
    outer[:, 1] -= 3e3 * outer[:, 0]
    assert (outer @ inner - before).norm() < 1e-2 * before.norm()
    save_file(tensors, file, {"format": "pt"})
    flags = ["--verify", "--port", "0", *FLAGS, "--dtype", "bfloat16"]
    command = [BIN / "svdserve", "serve", model, *flags]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    log = done.stdout + done.stderr
    assert done.returncode == 2, log[-4000:]
    assert "Traceback" not in log
    (line,) = (line for line in log.splitlines() if line.startswith("error: "))
    assert line.startswith("error: 1 of 12 factored layers give other outputs than their weights: ")
    assert f"{module} is off by " in line
    assert "allowed is 0.05; " in line


def test_the_command_wants_a_compressed_model(root: Path) -> None:
    from svdserve.cli.main import app

    done = CliRunner().invoke(app, ["verify", str(root / "llama")])
    assert "no quantization_config" in str(done.exception)
