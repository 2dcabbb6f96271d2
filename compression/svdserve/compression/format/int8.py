"""Per-row symmetric int8: a matrix W [m, n] as integers Q in -127..127 and scales s [m], W ≈ s Q.

This is what the W8A8 kernels of vLLM take: int8 weights with one float32 scale for each output.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Weights = Literal["float", "int8"]
"""How weights are stored."""

_LARGEST = 127


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q (int8 [m, n]) and s (float32 [m], positive), s from the greatest magnitude of each row."""
    weight = weight.double()
    peak = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(len(weight))
    # A row of zeros needs a scale above 0 as well.
    scale = (peak / _LARGEST).float().clamp_min(torch.finfo(torch.float32).tiny)
    levels = (weight / scale.double()[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return levels.to(torch.int8), scale


def dequantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """s Q [m, n], multiplied in float32, or in float64 where that is ``dtype``."""
    exact = torch.promote_types(dtype, torch.float32)
    return (values.to(exact) * scale.to(exact)[:, None]).to(dtype)


def rounded(weight: Tensor) -> Tensor:
    """``weight`` with the error that int8 leaves, in its own dtype."""
    return dequantized(*quantized(weight), weight.dtype)


def packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A matrix as it is stored on the CPU: int8 under its name, scales under ``<name>_scale``."""
    values, scale = quantized(weight)
    return {name: values.cpu(), f"{name}_scale": scale.cpu()}


def unpacked(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix that ``packed`` stored, in float32; one that is not int8 as it is."""
    scale = tensors.get(f"{name}_scale")
    values = tensors[name]
    return values if scale is None else dequantized(values, scale, torch.float32)
