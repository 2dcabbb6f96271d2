"""Shards hold what their parts held."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdserve.compression.format.tensors import INDEX_FILE, TensorFiles
from svdserve.compression.format.writer import merge_shards


@pytest.mark.parametrize("limit", [10**9, 70_000, 1])
def test_merged_shards_hold_the_same_tensors(tmp_path: Path, limit: int):
    parts, want = [], {}
    for i in range(4):
        tensors = {
            f"t{i}.{j}": torch.randn(50 + j, 60, dtype=torch.float32).to(dtype)
            for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.int32))
        }
        want |= tensors
        parts.append(tmp_path / f"part{i}")
        save_file(tensors, parts[-1])
    target = tmp_path / "out"
    target.mkdir()
    merge_shards(parts, target, limit)
    files = TensorFiles(target)
    got = files.load(list(files.info))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    shards = {10**9: 1, 70_000: 2, 1: 4}[limit]
    assert len(list(target.glob("*.safetensors"))) == shards
    assert (target / INDEX_FILE).exists() == (shards > 1)
