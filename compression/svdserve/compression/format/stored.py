"""The tensors that store one module, with the layout and the codec that decode them."""

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
        layout, codec: decode the tensors.
        tensors: the tensors by suffix, as ``ModuleSpec.tensors`` names them.
    """

    layout: Layout
    codec: Codec
    tensors: Mapping[str, Tensor]

    def decoded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The matrices in a floating-point ``dtype`` and the indices, by suffix."""
        found = {
            name: decoded(self.codec, name, self.tensors, dtype) for name in self.layout.matrices
        }
        return found | {name: self.tensors[name] for name in self.layout.indices}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [m, n], the product of the factors, computed in ``dtype``."""
        return self.layout.dense(self.decoded(dtype))

    @property
    def rank(self) -> int:
        return self.layout.rank(self.tensors)


def store(factors: Factors, layout: Layout, codec: Codec, dtype: torch.dtype) -> StoredFactors:
    """Encode float64 factors for a model in ``dtype``.

    If a value overflows, the matrices are balanced and encoded again.

    Raises:
        FloatingPointError: a value overflows even after balancing.
    """
    matrices = layout.encode(factors)
    for balance in (False, True):
        given = layout.balanced(matrices) if balance else matrices
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
        f"its factors exceed {torch.finfo(dtype).max:.3g}, the largest value of {kind}"
    )
