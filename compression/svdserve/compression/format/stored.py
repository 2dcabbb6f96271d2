"""The tensors that store one module, with the layout and the codec that decode them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svdserve.compression.format.codecs import Codec
from svdserve.compression.format.codecs.base import decoded
from svdserve.compression.format.layouts import Factors, Layout
from svdserve.compression.format.layouts.base import Tensors

_RIDGE = 1e-3  # of the mean of the Gram matrix's diagonal, which is added to it
_PULL = 1e-3  # the same of the latent's Gram matrix, by which factor_out is kept near what it was


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
    if gram is not None and not codec.plain and bool(gram.diagonal().mean() > 0):
        channels = layout.multiplied(matrices, len(gram))
        if channels is not None:
            gram = gram.double().to(matrices["factor_in"].device)
            return indices | _refitted(matrices, layout, codec, dtype, gram, channels)
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

    With the latent z = M x, M [r, n], and H = M G Mᵀ, factor_out becomes C' that minimises
    ‖(C' M - W) X‖² + λ ‖C' - C‖². Without λ, latents that are almost always zero would get
    coefficients so large that int8 leaves nothing of the others.
    """
    inner, outer = matrices["factor_in"].double(), matrices["factor_out"].double()
    mine = gram if len(channels) == len(gram) else gram[channels][:, channels]
    tensors = _named("factor_in", codec.encode_for(inner, dtype, mine))
    del mine
    identity = torch.eye(outer.shape[1], dtype=torch.float64, device=outer.device)
    rounded = decoded(codec, "factor_in", tensors, torch.float64)
    latent = layout.dense({**matrices, "factor_in": rounded, "factor_out": identity})
    weight = layout.dense({**matrices, "factor_in": inner, "factor_out": outer})
    # The ridge keeps what calibration has not seen near the weight.
    passed = gram @ latent.T + _RIDGE * gram.diagonal().mean() * latent.T
    latent_gram = latent @ passed
    pull = _PULL * latent_gram.diagonal().mean()
    root, failed = torch.linalg.cholesky_ex(latent_gram + pull * identity)
    if not int(failed):
        outer = torch.cholesky_solve((weight @ passed + pull * outer).T, root).T
    return tensors | _named("factor_out", codec.encode_for(outer, dtype, latent_gram))


def _named(name: str, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}{suffix}": tensor for suffix, tensor in encoded.items()}
