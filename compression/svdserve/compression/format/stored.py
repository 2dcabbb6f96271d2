"""The tensors that store one module, with the layout and the codec that say what they mean."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svdserve.compression.format.codecs import Codec
from svdserve.compression.format.codecs.base import decoded
from svdserve.compression.format.layouts import Factors, Layout


@dataclass(frozen=True)
class StoredFactors:
    """A weight [m, n] of rank r as it is stored.

    Attributes:
        layout, codec: what the tensors mean.
        tensors: by suffix, as ``ModuleSpec.tensors`` names them.
    """

    layout: Layout
    codec: Codec
    tensors: Mapping[str, Tensor]

    def decoded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Matrices in a floating-point ``dtype``, and indices, by suffix."""
        found = {
            name: decoded(self.codec, name, self.tensors, dtype) for name in self.layout.matrices
        }
        return found | {name: self.tensors[name] for name in self.layout.indices}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [m, n] that the factors stand for, multiplied out in ``dtype``."""
        return self.layout.dense(self.decoded(dtype))

    @property
    def rank(self) -> int:
        return self.layout.rank(self.tensors)


def store(factors: Factors, layout: Layout, codec: Codec, dtype: torch.dtype) -> StoredFactors:
    """Float64 factors as they are stored, of a model in ``dtype``.

    Where that is not finite, the matrices are balanced first.

    Raises:
        FloatingPointError: not even then is every number finite.
    """
    matrices = layout.encode(factors)
    for given in (matrices, layout.balanced(matrices)):
        tensors: dict[str, Tensor] = {name: given[name] for name in layout.indices}
        for name in layout.matrices:
            encoded = codec.encode(given[name], dtype)
            tensors |= {f"{name}{suffix}": tensor for suffix, tensor in encoded.items()}
        found = StoredFactors(layout, codec, tensors)
        widened = found.decoded(dtype)
        if all(bool(widened[name].isfinite().all()) for name in layout.matrices):
            return found
    kind = str(dtype).removeprefix("torch.")
    raise FloatingPointError(
        f"its factors are beyond {torch.finfo(dtype).max:.3g}, all that {kind} can hold"
    )
