"""What a TP rank reads: its share of every tensor, equal to that share of the whole weight."""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import random_factors, write_checkpoint
from models import save_model
from svdserve.compression.format.layouts import LAYOUTS, Factors, Layout
from svdserve.compression.format.reader import Checkpoint, open_checkpoint
from svdserve.server.plugin.quantization import Part
from svdserve.server.plugin.shares import Places, read_dense, read_factors

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("shares") / "dense", num_hidden_layers=1)


def write(
    dense: Path, target: Path, layout: Layout, *, int8: bool = False, stays: str = ""
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


def kept(factors: Factors) -> int:
    tensors = (factors.factor_in, factors.factor_out, factors.pivots)
    scales = (factors.factor_in_scale, factors.factor_out_scale)
    return sum(tensor.nbytes for tensor in (*tensors, *scales) if tensor is not None)


def product(factors: Factors, places: Places, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rank's part of z from its input channels x [channels], and its rows of C."""
    factors = factors.to(torch.float64)
    x = x[places.order]
    z = factors.factor_in @ x[len(places.slots) :]
    z[places.slots.start : places.slots.stop] += x[: len(places.slots)]
    return z, factors.factor_out


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_add_up_to_the_whole_and_read_what_they_keep(
    layout: Layout, int8: bool, ranks: int, dense: Path, tmp_path: Path
) -> None:
    checkpoint = write(dense, tmp_path / "low", layout, int8=int8)
    for name, spec in checkpoint.config.modules.items():
        part = Part((name,), spec, spec.weights)
        whole = checkpoint.factors(name).to(torch.float64).dense()
        x = torch.randn(spec.in_features, generator=torch.Generator().manual_seed(0)).double()
        everything = [torch.arange(size) for size in spec.out_features]
        z = torch.zeros(spec.rank, dtype=torch.float64)
        for rank in range(ranks):
            # Row-parallel: the rank's input channels, all outputs.
            width = spec.in_features // ranks
            channels = range(rank * width, (rank + 1) * width)
            before = checkpoint.files.bytes_read
            factors, places = read_factors(checkpoint, part, everything, channels)
            assert checkpoint.files.bytes_read - before <= 1.1 * kept(factors)
            partial, outer = product(factors, places, x[channels.start : channels.stop])
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
            factors, places = read_factors(checkpoint, part, rows, range(spec.in_features))
            assert checkpoint.files.bytes_read - before <= 1.1 * kept(factors)
            z, outer = product(factors, places, x)
            mine = torch.cat([start + r for start, r in zip(starts, rows, strict=False)])
            torch.testing.assert_close(outer @ z, (whole @ x)[mine])


@pytest.mark.parametrize("int8", [False, True])
def test_dense_linears_beside_factors(int8: bool, dense: Path, tmp_path: Path) -> None:
    checkpoint = write(dense, tmp_path / "low", "pair", int8=int8, stays="down_proj")
    name = "model.layers.0.mlp.down_proj"
    part = Part((name,), None, "int8" if int8 else "float")
    stored = checkpoint.files.load([f"{name}.{suffix}" for suffix in part.suffixes])
    rows, channels = torch.tensor([7, 6, 9]), range(64, 128)
    before = checkpoint.files.bytes_read
    weight, scale = read_dense(checkpoint, part, [rows], channels)
    read = checkpoint.files.bytes_read - before
    assert torch.equal(weight, stored[f"{name}.weight"][rows][:, 64:128])
    assert read == 4 * 64 * weight.element_size() + (16 if int8 else 0)  # rows 6 to 9
    if int8:
        assert scale is not None
        assert torch.equal(scale, stored[f"{name}.weight_scale"][rows])
