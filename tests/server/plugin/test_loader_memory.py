"""Memory that the factors save is memory that the process does not hold."""

from pathlib import Path

import pytest
import torch

from checkpoints import random_factors, write_checkpoint
from models import save_model
from vllm_run import run

pytestmark = pytest.mark.vllm


def test_resident_memory_falls_by_what_the_factors_save(tmp_path: Path) -> None:
    """Dense and compressed model in one fresh process each; at least 90 % of the saving arrives."""
    dense = save_model(
        "llama",
        tmp_path / "dense",
        dtype=torch.bfloat16,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
    )
    compressed = write_checkpoint(
        dense,
        tmp_path / "compressed",
        layout="interpolative",
        shared=True,
        rank_rule=lambda _module, m, n: min(m, n) // 4,
        factorise=random_factors,
    )
    prompts = [[5, 6, 7]]
    before, after = (
        run(tmp_path / "run" / model.name, [{"model": str(model), "dtype": "bfloat16"}], prompts)[0]
        for model in (dense, compressed)
    )
    assert before.error == after.error == ""
    (report,) = after.reports
    assert report is not None
    stored = report["stored"]
    saved = stored["dense_equivalent"] - stored["lowrank"] - stored["dense"]
    assert saved > 100 * 2**20
    fell = before.resident_bytes - after.resident_bytes
    print(f"saved {saved / 2**20:.1f} MiB, resident memory fell {fell / 2**20:.1f} MiB")
    assert fell >= 0.9 * saved
