"""A dense model with ``--load-format svdserve``: what it gets, and that its logits stay right."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters import write_adapter
from checkpoints import write_checkpoint
from fused_kernel import needs_kernel
from models import random_tokens, save_model
from vllm_run import Served, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), needs_kernel]

PROMPT = random_tokens(1, 60, seed=1)[0].tolist()
# A tied head; biases and a head of its own; another activation and other norms.
ARCHITECTURES = ("llama", "qwen2", "gemma3")
BLOCKS, LINEARS = 3, 4  # of a pico model; fused linears of a block
OURS = {"load_format": "svdserve"}


@dataclass(frozen=True)
class Engines:
    root: Path
    served: dict[str, Served]

    def report(self, name: str) -> dict[str, Any]:
        """Of the first worker."""
        assert self.served[name].error == ""
        report = self.served[name].reports[0]
        assert report is not None
        return report

    def error(self, name: str, model: str) -> float:
        """Root mean square over the prompt's log probabilities, against float32 in transformers."""
        assert self.served[name].error == ""
        exact = AutoModelForCausalLM.from_pretrained(self.root / model, dtype=torch.float32)
        with torch.no_grad():
            expected = exact(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
        found = self.served[name].logprobs[0][: len(PROMPT) - 1]
        return float((found - expected).square().mean().sqrt())


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Every engine of this file in one process."""
    root = tmp_path_factory.mktemp("models")
    wanted: dict[str, dict[str, Any]] = {}
    for architecture in ARCHITECTURES:
        dense = {"model": str(save_model(architecture, root / architecture, torch.bfloat16))}
        wanted[f"{architecture}-vllm"] = dense
        wanted[architecture] = dense | OURS
    qwen2 = wanted["qwen2"]
    wanted["two"] = {**qwen2, "tensor_parallel_size": 2}
    wanted["compiled"] = {**qwen2, "enforce_eager": False}
    wanted["float32"] = {**qwen2, "dtype": "float32"}
    wanted["reloaded"] = {**qwen2, "reload": True}
    write_adapter(root / "adapter", root / "llama", root / "adapted")
    adapter = {"adapter": str(root / "adapter")}
    wanted["adapted"] = {**wanted["llama"], **adapter}
    wanted["adapted-vllm"] = {**wanted["llama-vllm"], **adapter}
    low = write_checkpoint(
        root / "qwen2",
        root / "low",
        layout="interpolative",
        shared=False,
        keep_dense=frozenset({"gate_proj", "up_proj"}),
    )
    wanted["low"] = {"model": str(low)}
    every = [{"dtype": "bfloat16", **engine} for engine in wanted.values()]
    served = run(root / "run", every, [PROMPT], timeout=1500)
    return Engines(root, dict(zip(wanted, served, strict=True)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_round_no_worse_than_vllm(architecture: str, engines: Engines) -> None:
    stock = engines.error(f"{architecture}-vllm", architecture)
    assert engines.error(architecture, architecture) <= 1.5 * stock


@pytest.mark.parametrize("name", ["two", "compiled"])
def test_logits_on_two_ranks_and_compiled(name: str, engines: Engines) -> None:
    assert engines.error(name, "qwen2") <= 1.5 * engines.error("qwen2-vllm", "qwen2")
    for report in engines.served[name].reports:
        assert report is not None
        assert report["joined"] == BLOCKS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernel_computes_linears_and_head(architecture: str, engines: Engines) -> None:
    """The embedding is packed beside the head, as vLLM does."""
    report = engines.report(architecture)
    assert (report["layers"], report["fused"]) == (0, BLOCKS * LINEARS + 2)
    assert report["joined"] == BLOCKS
    assert report["norms"] == ["svdserve", "native"]
    assert report["unpacked"] == 0


@pytest.mark.parametrize("name", ["llama-vllm", "qwen2-vllm", "gemma3-vllm", "float32"])
def test_other_dense_models_are_left_alone(name: str, engines: Engines) -> None:
    """Those without the load format, and those in float32 with it."""
    report = engines.report(name)
    assert (report["fused"], report["joined"], report["norms"]) == (0, 0, ["native"])


def test_adapters_see_gate_and_up(engines: Engines) -> None:
    report = engines.report("adapted")
    assert (report["fused"], report["joined"]) == (BLOCKS * LINEARS + 2, 0)
    stock = engines.error("adapted-vllm", "adapted")
    assert engines.error("adapted", "adapted") <= 1.5 * stock


def test_the_whole_layers_of_a_compressed_model_get_the_same(engines: Engines) -> None:
    """Gate and up, whose activation is joined, and the head."""
    report = engines.report("low")
    assert (report["fused"], report["joined"]) == (BLOCKS * 6 + 2, BLOCKS)
    assert engines.error("low", "low") <= 1.5 * engines.error("qwen2-vllm", "qwen2")


def test_weights_are_reloaded_in_place(engines: Engines) -> None:
    assert engines.served["reloaded"].error == ""
