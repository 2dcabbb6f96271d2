"""Int8 checkpoints in transformers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from models import random_tokens, save_model
from svdserve.compression.format.tensors import SINGLE_FILE

LINEAR = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_equals_the_multiplied_out_model(
    layout: str, shared: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Computed in float32: the rounded weights are what is compared, not products in bfloat16."""
    small, reference = tmp_path / "small", tmp_path / "reference"
    write_checkpoint(
        save_model("qwen2", tmp_path / "dense"),
        small,
        layout=layout,
        shared=shared,
        keep_dense=frozenset({"o_proj", "v_proj"}),
        reference=reference,
        int8=True,
    )
    tokens = random_tokens(2, 20)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=dtype)
    assert model.get_submodule(LINEAR).weight.dtype == torch.int8
    assert model.get_submodule(LINEAR).weight_scale.dtype == torch.float32
    twin = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype)
    with torch.no_grad():
        ours, theirs = (m(tokens).logits.double() for m in (model, twin))
    assert float((ours - theirs).norm() / theirs.norm()) < (
        1e-5 if dtype == torch.float32 else 0.03
    )
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / SINGLE_FILE) for path in (small, tmp_path / "again"))
    if dtype == torch.float32:
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
