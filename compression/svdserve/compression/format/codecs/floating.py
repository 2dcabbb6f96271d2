"""The codec ``float``: a matrix in float32, float16 or bfloat16."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from svdserve.compression.format.codecs.base import FLOAT_DTYPES, Codec


class Float(Codec):
    """One tensor [m, n] in the dtype of the model."""

    name = "float"
    plain = True
    axes: ClassVar[Mapping[str, tuple[int, ...]]] = {"": (0, 1)}

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"": shape}

    def dtypes(self, suffix: str) -> tuple[torch.dtype, ...]:  # noqa: ARG002 (there is one)
        return FLOAT_DTYPES

    def encode(self, matrix: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"": matrix.to(dtype)}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return tensors[""].to(dtype)
