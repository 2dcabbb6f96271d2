"""What a TP rank reads: its share of every tensor, equal to that share of the whole weight."""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import random_factors, write_checkpoint
from models import save_model
from svdserve.compression.format.codecs import get_codec
from svdserve.compression.format.reader import Checkpoint, open_checkpoint
from svdserve.server.plugin.layer_parts import LayerPart
from svdserve.server.plugin.shares import LowRankShare, read_factors, read_whole

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("shares") / "dense", num_hidden_layers=1)


def write(
    dense: Path, target: Path, layout: str, *, int8: bool = False, stays: str = ""
) -> Checkpoint:
    """Pivots of random factors come in any order."""
    write_checkpoint(
        dense,
        target,
        layout=layout,
        shared=True,
        keep_dense=frozenset({stays}),
        factorise=random_factors,
        int8=int8,
    )
    return open_checkpoint(target)


def kept(share: LowRankShare, indices: int) -> int:
    """Bytes of a share and of the module's indices, which are read whole."""
    matrices = (share.inner, share.outer)
    return indices + sum(t.nbytes for matrix in matrices for t in matrix.tensors.values())


def product(share: LowRankShare, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rank's part of z from its input channels x [channels], and its rows of C."""
    inner, outer = (
        matrix.codec.decode(matrix.tensors, torch.float64) for matrix in (share.inner, share.outer)
    )
    slots = share.inputs.slots
    x = x if share.inputs.order is None else x[share.inputs.order]
    z = inner @ x[len(slots) :]
    z[slots.start : slots.stop] += x[: len(slots)]
    return z, outer


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("layout", ["pair", "interpolative"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_add_up_to_the_whole_and_read_what_they_keep(
    layout: str, int8: bool, ranks: int, dense: Path, tmp_path: Path
) -> None:
    checkpoint = write(dense, tmp_path / "low", layout, int8=int8)
    for name, spec in checkpoint.config.modules.items():
        part = LayerPart((name,), spec, get_codec(spec.codec))
        whole = checkpoint.factors(name).dense(torch.float64)
        x = torch.randn(spec.in_features, generator=torch.Generator().manual_seed(0)).double()
        everything = [torch.arange(size) for size in spec.out_features]
        indices = 4 * spec.rank if layout == "interpolative" else 0
        z = torch.zeros(spec.rank, dtype=torch.float64)
        for rank in range(ranks):
            # Row-parallel: the rank's input channels, all outputs.
            width = spec.in_features // ranks
            channels = range(rank * width, (rank + 1) * width)
            before = checkpoint.files.bytes_read
            share = read_factors(checkpoint, part, everything, channels)
            assert checkpoint.files.bytes_read - before <= 1.1 * kept(share, indices)
            partial, outer = product(share, x[channels.start : channels.stop])
            z += partial
        torch.testing.assert_close(outer @ z, whole @ x)
        for rank in range(ranks):
            # Column-parallel: all input channels, the rank's outputs of each linear, reversed.
            starts = accumulate(spec.out_features, initial=0)
            rows = [
                torch.arange(rank * size // ranks, (rank + 1) * size // ranks).flip(0)
                for size in spec.out_features
            ]
            before = checkpoint.files.bytes_read
            share = read_factors(checkpoint, part, rows, range(spec.in_features))
            assert checkpoint.files.bytes_read - before <= 1.1 * kept(share, indices)
            z, outer = product(share, x)
            mine = torch.cat([start + r for start, r in zip(starts, rows, strict=False)])
            torch.testing.assert_close(outer @ z, (whole @ x)[mine])


@pytest.mark.parametrize("int8", [False, True])
def test_dense_linears_beside_factors(int8: bool, dense: Path, tmp_path: Path) -> None:
    checkpoint = write(dense, tmp_path / "low", "pair", int8=int8, stays="down_proj")
    name = "model.layers.0.mlp.down_proj"
    part = LayerPart((name,), None, get_codec("int8" if int8 else "float"))
    stored = checkpoint.files.load([f"{name}.{suffix}" for suffix in part.suffixes])
    rows, channels = torch.tensor([7, 6, 9]), range(64, 128)
    before = checkpoint.files.bytes_read
    matrix = read_whole(checkpoint, part, [rows], channels)
    read = checkpoint.files.bytes_read - before
    weight = matrix.tensors[""]
    assert torch.equal(weight, stored[f"{name}.weight"][rows][:, 64:128])
    assert read == 4 * 64 * weight.element_size() + (16 if int8 else 0)  # rows 6 to 9
    if int8:
        assert torch.equal(matrix.tensors["_scale"], stored[f"{name}.weight_scale"][rows])
