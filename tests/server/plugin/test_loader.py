"""What the model loader refuses, in its own words, and which load formats choose it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from models import save_model
from vllm_run import Served, run

pytestmark = pytest.mark.vllm

Weights = dict[str, torch.Tensor]
FIRST = "model.layers.0"


def _nan_factor(weights: Weights) -> None:
    weights[f"{FIRST}.mlp.down_proj.factor_out"][3, 5] = torch.nan


def _wrong_shape(weights: Weights) -> None:
    name = f"{FIRST}.mlp.down_proj.factor_in"
    weights[name] = weights[name][:, 1:].contiguous()


def _without(name: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        del weights[name]

    return change


# What happens to the checkpoint's tensors, and what the message must name.
DAMAGE: dict[str, tuple[Callable[[Weights], None], str]] = {
    "NaN factor": (_nan_factor, f"module {FIRST}.mlp.down_proj: factor_out is not finite"),
    "wrong shape": (_wrong_shape, f"module {FIRST}.mlp.down_proj: factor_in is ["),
    "no factor": (
        _without(f"{FIRST}.mlp.up_proj.factor_out"),
        f"module {FIRST}.mlp.up_proj: tensor {FIRST}.mlp.up_proj.factor_out is missing",
    ),
    "no dense member of a merged layer": (
        _without(f"{FIRST}.self_attn.k_proj.weight"),
        f"tensor {FIRST}.self_attn.k_proj.weight is missing",
    ),
    "no dense linear": (
        _without(f"{FIRST}.self_attn.o_proj.weight"),
        f"float linear {FIRST}.self_attn.o_proj: tensor {FIRST}.self_attn.o_proj.weight is missing",
    ),
    "no norm": (
        _without(f"{FIRST}.input_layernorm.weight"),
        f"the weights of {FIRST}.input_layernorm.weight are missing",
    ),
    "no bias of one member": (
        _without(f"{FIRST}.self_attn.v_proj.bias"),
        f"the weights of {FIRST}.self_attn.qkv_proj.bias are missing",
    ),
}

# Engine arguments that select a loader, and the refusal; empty where it must work.
FORMATS: dict[str, tuple[str, str]] = {
    "dummy": ("checkpoint", "--load-format dummy cannot load an svdserve checkpoint; allowed: "),
    "svdserve": ("checkpoint", ""),
    "safetensors": ("checkpoint", ""),
    "svdserve for a dense model": ("dense", ""),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    root = tmp_path_factory.mktemp("damaged")
    dense = save_model("qwen2", root / "dense")
    checkpoint = write_checkpoint(
        dense,
        root / "checkpoint",
        layout="interpolative",
        shared=False,
        keep_dense=frozenset({"k_proj", "o_proj"}),
    )
    engines = {}
    for name, (change, _) in DAMAGE.items():
        copy = shutil.copytree(checkpoint, root / name.replace(" ", "_"))
        weights = load_file(copy / "model.safetensors")
        change(weights)
        save_file(weights, copy / "model.safetensors")
        engines[name] = {"model": str(copy)}
    for name, (model, _) in FORMATS.items():
        engines[name] = {"model": str(root / model), "load_format": name.split()[0]}
    stranger = shutil.copytree(checkpoint, root / "stranger")
    _rename_module(stranger, f"{FIRST}.mlp.down_proj", f"{FIRST}.mlp.side_proj")
    engines["stranger"] = {"model": str(stranger)}
    draft = {"model": str(checkpoint), "method": "draft_model", "num_speculative_tokens": 2}
    engines["draft"] = {"model": str(dense), "speculative_config": draft}
    engines["reload"] = {"model": str(checkpoint), "reload": True}
    served = run(root / "run", list(engines.values()), [[5, 6, 7]])
    return dict(zip(engines, served, strict=True))


def _rename_module(checkpoint: Path, old: str, new: str) -> None:
    """List and store a factored module under a name that the architecture does not have."""
    config = json.loads((checkpoint / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules[new] = modules.pop(old) | {"members": [new.rpartition(".")[2]]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    weights = load_file(checkpoint / "model.safetensors")
    renamed = {name.replace(f"{old}.", f"{new}."): weight for name, weight in weights.items()}
    save_file(renamed, checkpoint / "model.safetensors")


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_a_damaged_checkpoint(name: str, results: dict[str, Served]) -> None:
    assert DAMAGE[name][1] in results[name].error
    assert results[name].tokens == []


def test_refuses_a_module_that_the_model_lacks(results: dict[str, Served]) -> None:
    expected = f"module {FIRST}.mlp.side_proj is factored, but Qwen2ForCausalLM of vLLM has no such"
    assert expected in results["stranger"].error
    assert "transformers" in results["stranger"].error


def test_refuses_a_compressed_draft(results: dict[str, Served]) -> None:
    assert "not supported as the draft of speculative decoding" in results["draft"].error


def test_refuses_to_reload_in_place(results: dict[str, Served]) -> None:
    assert "svdserve models cannot reload weights in place" in results["reload"].error


@pytest.mark.parametrize("name", FORMATS)
def test_load_formats(name: str, results: dict[str, Served]) -> None:
    served = results[name]
    if refusal := FORMATS[name][1]:
        assert refusal in served.error
    else:
        assert served.error == ""
        assert served.reports[0] is not None
