"""The tensors that store one module, with the layout and the codec that decode them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svdserve.compression.format.codecs import Codec
from svdserve.compression.format.codecs.base import decoded
from svdserve.compression.format.layouts import Factors, Layout
from svdserve.compression.format.layouts.base import Tensors

_RIDGE = 1e-3  # of the mean of the Gram matrix's diagonal


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


def store(
    factors: Factors,
    layout: Layout,
    codec: Codec,
    dtype: torch.dtype,
    gram: Tensor | None = None,
) -> StoredFactors:
    """Encode float64 factors for a model in ``dtype``.

    If a value overflows, the matrices are balanced and encoded again.

    Args:
        gram: X Xᵀ [n, n] of the inputs. A codec that rounds then keeps W X, rather than W: it
            rounds factor_in first, and factor_out is fitted to what factor_in has become.

    Raises:
        FloatingPointError: a value overflows even after balancing.
    """
    matrices = layout.encode(factors)
    for balance in (False, True):
        given = layout.balanced(matrices) if balance else matrices
        found = StoredFactors(layout, codec, _encoded(given, layout, codec, dtype, gram))
        widened = found.decoded(dtype)
        if all(bool(widened[name].isfinite().all()) for name in layout.matrices):
            return found
    kind = str(dtype).removeprefix("torch.")
    raise FloatingPointError(
        f"its factors exceed {torch.finfo(dtype).max:.3g}, the largest value of {kind}"
    )


def _encoded(
    matrices: Tensors, layout: Layout, codec: Codec, dtype: torch.dtype, gram: Tensor | None
) -> dict[str, Tensor]:
    indices = {name: matrices[name] for name in layout.indices}
    if gram is not None and not codec.plain:
        channels = layout.multiplied(matrices, len(gram))
        if channels is not None:
            return indices | _refitted(matrices, layout, codec, dtype, gram.double(), channels)
    tensors = dict(indices)
    for name in layout.matrices:
        tensors |= _named(name, codec.encode(matrices[name], dtype))
    return tensors


def _refitted(
    matrices: Tensors,
    layout: Layout,
    codec: Codec,
    dtype: torch.dtype,
    gram: Tensor,
    channels: Tensor,
) -> dict[str, Tensor]:
    """Round factor_in, fit factor_out to it by least squares, and round that.

    With the latent z = M x, M [r, n], the least squares solution is W G Mᵀ (M G Mᵀ)⁻¹.
    """
    channels = channels.to(gram.device)
    inner = matrices["factor_in"].double()
    tensors = _named("factor_in", codec.encode_for(inner, dtype, gram[channels][:, channels]))
    rounded = {**matrices, "factor_in": decoded(codec, "factor_in", tensors, torch.float64)}
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    latent = layout.latent(identity, rounded).T
    # The ridge keeps what calibration has not seen near the weight.
    known = gram + _RIDGE * gram.diagonal().mean() * identity
    passed = known @ latent.T
    latent_gram = latent @ passed
    weight = layout.dense({**matrices, "factor_in": inner})
    outer = torch.linalg.lstsq(latent_gram, (weight @ passed).T).solution.T
    return tensors | _named("factor_out", codec.encode_for(outer, dtype, latent_gram))


def _named(name: str, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}{suffix}": tensor for suffix, tensor in encoded.items()}
