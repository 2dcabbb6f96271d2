"""What tests of the fused CPU kernel share."""

import pytest
import torch
from torch import Tensor

from svdserve.kernels import cpu

needs_kernel = pytest.mark.skipif(bool(cpu.unsupported()), reason=str(cpu.unsupported()))

ENGINES = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            cpu.unsupported() is not None or not torch.ops.svdserve.has_amx(),
            reason="this processor has no AMX",
        ),
    ),
]

# m, n, r: around the sizes of a vector (16), a panel and a word (32); rank one, rank full.
SHAPES = [
    (1, 2, 1),
    (16, 32, 16),
    (17, 33, 15),
    (31, 64, 33),
    (70, 65, 64),
    (96, 40, 40),
    (100, 130, 47),
    (640, 576, 301),
]


def assert_close(got: Tensor, want: Tensor) -> None:
    """Two roundings to bfloat16 (2^-8 each), of z and of y."""
    scale = want.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=float(scale) * 2**-7)
