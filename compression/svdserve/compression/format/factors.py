"""A rank-r weight in one of its two stored layouts, and the arithmetic of rank and parameters.

Shapes: a weight W is [m, n] = [out, in] and y = W x.

* ``pair``: W = factor_out · factor_in, [m, r] · [r, n]; r(m + n) parameters.
* ``interpolative``: W = C [I Z] Πᵀ with C = W[:, pivots] stored as factor_out [m, r] and Z stored
  as factor_in [r, n - r]; y = C (x[pivots] + Z x[rest]), where ``rest`` are the other input
  channels in ascending order. It stores r² parameters fewer and is lossless: column interpolative
  decomposition, Cheng et al., "On the compression of low rank matrices", SIAM J. Sci. Comput. 2005;
  PIFA (arXiv 2501.19090) applies the row variant to language models.

Either layout may be stored in int8, with a scale for each row of each factor (int8.py).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.linalg import lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

from svdserve.compression.format.int8 import Weights, dequantized, quantized

Layout = Literal["pair", "interpolative"]
LAYOUTS: tuple[Layout, ...] = ("pair", "interpolative")
_POOLS = ThreadpoolController()


@dataclass(frozen=True)
class Factors:
    """The tensors that stand for a weight [m, n] of rank r.

    factor_in is [r, n] (pair) or [r, n - r] (interpolative), factor_out is [m, r], and pivots is
    int32 [r] (interpolative) or None (pair). Factors in int8 have scales, float32 [r] and [m];
    others have none.
    """

    factor_in: Tensor
    factor_out: Tensor
    pivots: Tensor | None = None
    factor_in_scale: Tensor | None = None
    factor_out_scale: Tensor | None = None

    @property
    def layout(self) -> Layout:
        return "pair" if self.pivots is None else "interpolative"

    @property
    def weights(self) -> Weights:
        return "float" if self.factor_out_scale is None else "int8"

    @property
    def rank(self) -> int:
        return self.factor_out.shape[1]

    @property
    def in_features(self) -> int:
        return self.factor_in.shape[1] + (0 if self.pivots is None else self.rank)

    def dense(self) -> Tensor:
        """The weight [m, n] that the factors stand for, in their dtype; float32 of int8."""
        if self.weights == "int8":
            return self.to(torch.float32).dense()
        if self.pivots is None:
            return self.factor_out @ self.factor_in
        pivots = self.pivots.long()
        weight = self.factor_out.new_empty(self.factor_out.shape[0], self.in_features)
        weight[:, pivots] = self.factor_out
        weight[:, other_channels(pivots, self.in_features)] = self.factor_out @ self.factor_in
        return weight

    def to(self, dtype: torch.dtype) -> "Factors":
        """The same factors with both matrices in a floating ``dtype``; pivots stay int32."""
        if self.factor_in_scale is None or self.factor_out_scale is None:
            return Factors(self.factor_in.to(dtype), self.factor_out.to(dtype), self.pivots)
        return Factors(
            dequantized(self.factor_in, self.factor_in_scale, dtype),
            dequantized(self.factor_out, self.factor_out_scale, dtype),
            self.pivots,
        )

    def quantized(self) -> "Factors":
        """Both matrices rounded to int8."""
        (inner, inner_scale), (outer, outer_scale) = map(
            quantized, (self.factor_in, self.factor_out)
        )
        return Factors(inner, outer, self.pivots, inner_scale, outer_scale)


def other_channels(pivots: Tensor, in_features: int) -> Tensor:
    """The channels [n - r] (int64, ascending) that are not pivots."""
    keep = torch.ones(in_features, dtype=torch.bool, device=pivots.device)
    keep[pivots.long()] = False
    return keep.nonzero().squeeze(1)


def interpolative(factors: Factors) -> Factors:
    """The interpolative layout of a pair [m, r] · [r, n], equal to it up to rounding.

    Pivots come from a column-pivoted QR (LAPACK geqp3) of factor_in in float64: with
    V Π = Q [R1 R2], Z = R1⁻¹ R2 and C = factor_out · V[:, pivots]. A factor_in of numerical rank
    below r leaves a singular R1; its rank is then cut to the numerical one, which loses nothing.
    A factor_in of zeros keeps one pivot, whose column is zero.
    """
    inner = factors.factor_in.double().cpu()
    # Half of a pivoted QR is matrix times vector. OpenBLAS splits each into threads that then wait
    # for each other: ten times slower, and minutes where other work shares the cores.
    with _POOLS.limit(limits=1, user_api="blas"):
        packed, order, *_ = lapack.dgeqp3(inner.numpy())
    upper = torch.from_numpy(packed[: factors.rank]).triu()
    diagonal = upper.diagonal().abs()
    rank = max(1, int((diagonal > diagonal[0] * 1e-12).sum()))
    if not bool(diagonal[0] > 0):
        upper = torch.eye(*upper.shape, dtype=upper.dtype)  # Z = 0, as nothing follows from zeros
    # LAPACK counts from 1. Ascending pivots spare a server sorting the factors when it loads them.
    pivots, rows = torch.from_numpy(order[:rank] - 1).sort()
    columns = torch.from_numpy(order[rank:] - 1).argsort()
    coefficients = torch.linalg.solve_triangular(
        upper[:rank, :rank], upper[:rank, rank:], upper=True
    )[rows][:, columns]
    outer = factors.factor_out.double().cpu() @ inner[:, pivots]
    target = factors.factor_in
    return Factors(
        factor_in=coefficients.to(target).contiguous(),
        factor_out=outer.to(factors.factor_out).contiguous(),
        pivots=pivots.to(device=target.device, dtype=torch.int32),
    )


def stored(factors: Factors, dtype: torch.dtype, weights: Weights) -> Factors:
    """Float64 factors as they are stored: in ``dtype``, or in int8 that is widened to it.

    A pair that ``dtype`` cannot hold is balanced first.

    Raises:
        FloatingPointError: not even then is every factor finite.
    """
    for given in (factors, _balanced(factors)):
        found = given.to(dtype) if weights == "float" else given.quantized()
        widened = found.to(dtype)
        if bool(widened.factor_in.isfinite().all() & widened.factor_out.isfinite().all()):
            return found
    kind = str(dtype).removeprefix("torch.")
    raise FloatingPointError(
        f"its factors are beyond {torch.finfo(dtype).max:.3g}, all that {kind} can hold"
    )


def _balanced(factors: Factors) -> Factors:
    """The same product from rows and columns of like norms; the interpolative layout as it is."""
    if factors.pivots is not None:
        return factors
    inner, outer = factors.factor_in.norm(dim=1), factors.factor_out.norm(dim=0)
    exponents = (torch.log2(outer / inner) / 2).nan_to_num(0.0, 0.0, 0.0).round()
    scale = torch.exp2(exponents)  # powers of two round nothing
    return Factors(factors.factor_in * scale[:, None], factors.factor_out / scale)


def parameters(layout: Layout, out_features: int, in_features: int, rank: int) -> int:
    """Stored parameters of a rank-r weight; pivots are counted as indices, not parameters."""
    total = rank * (out_features + in_features)
    return total if layout == "pair" else total - rank * rank


def rank_for_keep(layout: Layout, out_features: int, in_features: int, keep: float) -> int | None:
    """The largest rank that stores at most ``keep`` of the dense parameters, at least 1.

    Returns None where the weight is better left dense: the keep ratio is 1, or factors of that
    rank would store as much as the weight itself.
    """
    m, n = out_features, in_features
    budget = keep * m * n
    if keep >= 1:
        return None
    if layout == "pair":
        rank = math.floor(budget / (m + n))
    else:
        rank = math.floor(((m + n) - math.sqrt((m + n) ** 2 - 4 * budget)) / 2)
    rank = max(1, min(rank, m, n))
    return rank if parameters(layout, m, n, rank) < m * n else None
