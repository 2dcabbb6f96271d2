"""Bytes and operations of a step, beside what torch counts in a forward pass of transformers."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from files import file_bytes
from models import random_tokens, save_model
from svdserve.bench.ratios import StepWork, model_work

LENGTH = 24


def flops(directory: Path) -> int:
    """Of one forward pass over a prompt whose last logits are wanted, attention as a square."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(random_tokens(1, LENGTH), use_cache=False, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("layout", ["dense", "pair", "interpolative"])
def test_operations_of_prefill_are_those_that_torch_counts(
    tmp_path: Path, architecture: str, layout: str
):
    model = save_model(architecture, tmp_path / "dense")
    if layout != "dense":
        model = write_checkpoint(model, tmp_path / "low", layout=layout, shared=True)
    work = model_work(model)
    square, causal = LENGTH**2, LENGTH * (LENGTH + 1) // 2
    counted = flops(model) - 4 * (square - causal) * work.attention_width
    assert work.prefill(LENGTH).operations == counted


@pytest.mark.parametrize("tied", [True, False])
def test_decoding_reads_every_weight_once_and_the_embedding_only_as_the_head(
    tmp_path: Path, tied: bool
):
    dense = save_model("llama", tmp_path / "dense", tie_word_embeddings=tied)
    model = write_checkpoint(dense, tmp_path / "low", layout="interpolative", shared=True)
    config = AutoModelForCausalLM.from_pretrained(dense).config
    embedding = 0 if tied else config.vocab_size * config.hidden_size * 4
    size = config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * size * 4
    for directory in (dense, model):
        stored = sum(file_bytes(directory).values())
        assert model_work(directory).decode(3, 100).bytes == stored - embedding + 300 * kv


def test_the_engine_may_hold_other_bytes_than_the_files(tmp_path: Path):
    dense = save_model("llama", tmp_path / "dense")
    whole, half = (model_work(dense, dtype) for dtype in (None, torch.bfloat16))
    assert whole.decode(1, 10).bytes == 2 * half.decode(1, 10).bytes
    assert whole.decode(1, 10).operations == half.decode(1, 10).operations


def test_int4_has_the_operations_of_the_dense_model(tmp_path: Path):
    dense = save_model("llama", tmp_path / "dense", dtype=torch.bfloat16)
    script = Path(__file__).parents[2] / "benchmarks" / "int4.py"
    runpy.run_path(str(script))["write_int4"](dense, tmp_path / "int4")
    whole, packed = (model_work(path) for path in (dense, tmp_path / "int4"))
    assert packed.prefill(100).operations == whole.prefill(100).operations
    # A bfloat16 scale for each 64 weights of 4 bits.
    assert 4.25 / 16 < packed.linear_bytes / whole.linear_bytes < 0.3


def test_both_ratios_are_over_the_compressed_model():
    dense, small = StepWork(bytes=12, operations=30), StepWork(bytes=8, operations=10)
    assert small.bytes_ratio(dense) == 1.5
    assert small.operations_ratio(dense) == 3
