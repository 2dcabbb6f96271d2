"""A codec: 16-bit integers with one float32 step for each row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdserve.compression.format.codecs.base import Codec

_LARGEST = 32_767


class Int16(Codec):
    name = "example-int16"

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"": shape, "_step": shape[:1]}

    def dtypes(self, suffix: str) -> tuple[torch.dtype, ...]:
        return (torch.float32,) if suffix else (torch.int16,)

    def encode(self, matrix: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        del dtype
        wide = matrix.double()
        step = (wide.abs().amax(dim=1) / _LARGEST).float().clamp_min(1e-30)
        values = (wide / step.double()[:, None]).round().clamp(-_LARGEST, _LARGEST)
        return {"": values.to(torch.int16), "_step": step}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (tensors[""].to(exact) * tensors["_step"].to(exact)[:, None]).to(dtype)


INT16 = Int16()
