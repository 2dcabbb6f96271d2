"""Random low-rank linears and what they must give, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from svdserve.kernels import Part
from svdserve.kernels.reference import lowrank_linear

# Relative to the largest output: two roundings, of z and of y, and of sums in float32.
TOLERANCE = {torch.float32: 2**-19, torch.float16: 2**-9, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Shape:
    """A weight [outputs, channels] of a rank, in the interpolative or the pair layout."""

    outputs: int
    channels: int
    rank: int
    pivots: bool = True

    def part(self, dtype: torch.dtype, seed: int = 0) -> Part:
        """Factors of a weight whose outputs are of the size of x; pivots in no order."""
        generator = torch.Generator().manual_seed(seed)
        width = self.channels - self.rank if self.pivots else self.channels
        inner = torch.randn(self.rank, width, generator=generator) / self.channels**0.5
        outer = torch.randn(self.outputs, self.rank, generator=generator) / self.rank**0.5
        chosen = torch.randperm(self.channels, generator=generator)[: self.rank]
        pivots = chosen.to(torch.int32) if self.pivots else None
        return Part(inner.to(dtype), outer.to(dtype), pivots)

    def __str__(self) -> str:
        return f"{self.outputs}x{self.channels}r{self.rank}{'' if self.pivots else '-pair'}"


def inputs(rows: int, channels: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows)).to(dtype)


def assert_equals_definition(got: Tensor, x: Tensor, parts: list[Part], bias: Tensor | None):
    """Against the definition in float64, part by part."""
    assert got.dtype == x.dtype
    wide = [
        lowrank_linear(x.double(), p.factor_in.double(), p.factor_out.double(), p.pivots)
        for p in parts
    ]
    want = torch.cat(wide, dim=-1)
    if bias is not None:
        want = want + bias.double()
    assert got.shape == want.shape
    if want.numel():
        largest = float(want.abs().max())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[x.dtype] * largest)
