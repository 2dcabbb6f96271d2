"""The codec ``int8``: a matrix W [m, n] as integers Q in -127..127 and scales s [m], W ≈ s Q.

vLLM's W8A8 kernels take this form: int8 weights with one float32 scale for each output channel.
They multiply integers, as svdserve's kernel does, so the inputs of a product are rounded too.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from svdserve.compression.format.codecs.base import Codec
from svdserve.kernels.reference import rounded

SCALE = "_scale"
_LARGEST = 127
_ATTEMPTS = 8
_BLOCK = 64  # columns whose errors are moved to all later columns at once
_RIDGE = 1e-3  # of the mean of the Gram matrix's diagonal, which GPTQ adds to it


class Int8(Codec):
    """Symmetric int8 with one scale for each row."""

    name = "int8"
    product = "int8"
    revision = 3
    axes: ClassVar[Mapping[str, tuple[int, ...]]] = {"": (0, 1), SCALE: (0,)}

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"": shape, SCALE: shape[:1]}

    def dtypes(self, suffix: str) -> tuple[torch.dtype, ...]:
        return (torch.float32,) if suffix == SCALE else (torch.int8,)

    def encode(self, matrix: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        del dtype  # int8 is the same for every model
        values, scale = quantized(matrix)
        return {"": values, SCALE: scale}

    def encode_for(self, matrix: Tensor, dtype: torch.dtype, gram: Tensor) -> dict[str, Tensor]:
        """Round column by column, and move each column's error to the columns that follow."""
        del dtype
        values, scale = quantized_for(matrix, gram)
        return {"": values, SCALE: scale}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return dequantized(tensors[""], tensors[SCALE], dtype)

    def round_input(self, x: Tensor) -> Tensor:
        """As svdserve's CPU kernel rounds it; vLLM's kernels have one scale for a whole token."""
        return rounded(x)

    def check(self, suffix: str, tensor: Tensor) -> None:
        if suffix == SCALE and not bool(tensor.min() > 0):
            raise ValueError("must be positive")


def quantized_for(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Like ``quantized``, but Q makes ‖(W - s Q) X‖ small for the inputs X, rather than ‖W - s Q‖.

    GPTQ: Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained
    transformers", ICLR 2023, algorithm 1, with the columns in their own order. With correlated
    inputs the columns that follow can make up for most of a column's error.

    Args:
        weight: W [m, n].
        gram: X Xᵀ [n, n].
    """
    nearest, scale = quantized(weight)
    factor = _inverse_root(gram) if weight.shape[1] else None
    if factor is None:
        return nearest, scale
    columns, step, left = weight.shape[1], scale.double(), weight.double().clone()
    levels = torch.empty_like(left)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            moved = (left[:, column] / step).round().clamp(-_LARGEST, _LARGEST)
            # The largest value of a row stays, so that the row's scale is the same when the decoded
            # weight is rounded again.
            own = nearest[:, column].double()
            levels[:, column] = torch.where(own.abs() == _LARGEST, own, moved)
            error = (left[:, column] - levels[:, column] * step) / factor[column, column]
            left[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return levels.to(torch.int8), scale


def _inverse_root(gram: Tensor) -> Tensor | None:
    """The upper Cholesky root of G⁻¹, by which GPTQ moves errors; None if G has no usable inverse.

    A failure multiplies the ridge by 10, as in statistics/linalg.py.
    """
    ridge = _RIDGE * float(gram.diagonal().mean())
    for _ in range(_ATTEMPTS if ridge > 0 else 0):
        damped = gram.double().clone()
        damped.diagonal().add_(ridge)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(root)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper  # type: ignore[no-any-return]
        ridge *= 10
    return None


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q (int8 [m, n]) and s (float32 [m], positive): s is each row's largest magnitude / 127."""
    weight = weight.double()
    peak = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(len(weight))
    # A row of zeros also needs a positive scale.
    scale = (peak / _LARGEST).float().clamp_min(torch.finfo(torch.float32).tiny)
    levels = (weight / scale.double()[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return levels.to(torch.int8), scale


def dequantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """s Q [m, n], multiplied in float32, or in float64 if ``dtype`` is float64."""
    exact = torch.promote_types(dtype, torch.float32)
    return (values.to(exact) * scale.to(exact)[:, None]).to(dtype)
