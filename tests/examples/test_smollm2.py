"""The whole chain on a real model: fetch, compress, serve, and compare with the dense product."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smollm2 import fetch_smollm2
from svdserve.compression.format.reader import Checkpoint, open_checkpoint
from svdserve.compression.format.schema import linears_of
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Run, make_recipe
from vllm_run import run

TOP = 20
TOLERANCE = 1e-3  # of a log probability; 30 float32 layers in two engines, measured below 1e-4
PROMPT = "The city of Paris lies on the river Seine, and its"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The model, where `make demo` keeps it too."""
    root = Path(__file__).parents[2] / "work" / "demo"
    return fetch_smollm2(root / "SmolLM2-135M-Instruct")


def multiplied_out(checkpoint: Checkpoint, target: Path) -> Path:
    """The dense model that the factors stand for."""
    tensors = load_file(checkpoint.directory / SINGLE_FILE)
    for name, spec in checkpoint.config.modules.items():
        for suffix in spec.tensors():
            del tensors[f"{name}.{suffix}"]
        rows = checkpoint.factors(name).dense(torch.float32).split(spec.out_features)
        for linear, weight in zip(linears_of(name, spec), rows, strict=True):
            tensors[f"{linear}.weight"] = weight.contiguous()
    target.mkdir()
    save_file(tensors, target / SINGLE_FILE, metadata={"format": "pt"})
    config = read_json(checkpoint.directory / "config.json")
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    for file in checkpoint.directory.glob("tokenizer*.json"):
        shutil.copy(file, target)
    return target


def test_numbers_are_split_into_digits(smollm2: Path) -> None:
    """GGUF loses the original's Digits step; fetch_smollm2 puts it back."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    assert tokenizer.chat_template is not None


@pytest.mark.vllm
def test_served_compressed_equals_its_dense_product(smollm2: Path, tmp_path: Path) -> None:
    recipe = make_recipe(method="svd", allocator="uniform", keep=0.9, dtype="float32")
    compress(str(smollm2), tmp_path / "small", recipe, Run(progress=False))
    checkpoint = open_checkpoint(tmp_path / "small")
    dense = multiplied_out(checkpoint, tmp_path / "dense")
    prompt = AutoTokenizer.from_pretrained(smollm2)(PROMPT).input_ids
    engines = [{"model": str(path), "top_logprobs": TOP} for path in (tmp_path / "small", dense)]
    small, product = run(tmp_path / "run", engines, [prompt])
    assert small.error == product.error == ""
    assert small.tokens == product.tokens
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.tensor([prompt + small.tokens[0][:-1]])
        logits = model(ids).logits[0, len(prompt) - 1 :]
    assert small.tokens[0] == logits.argmax(-1).tolist()
    for served in (small, product):
        expected = logits.log_softmax(-1).gather(-1, served.top_tokens[0])
        torch.testing.assert_close(served.logprobs[0], expected, atol=TOLERANCE, rtol=0)
