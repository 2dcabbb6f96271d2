"""The layout ``interpolative``: r columns of W, and the coefficients of the others in them.

W = C [I Z] Πᵀ with C = W[:, pivots] stored as factor_out [m, r] and Z as factor_in [r, n - r];
y = C (x[pivots] + Z x[rest]), where ``rest`` are the other input channels in ascending order. It
stores r² parameters fewer than ``pair`` and loses nothing. This is the column interpolative
decomposition: Cheng et al., "On the compression of low rank matrices", SIAM J. Sci. Comput. 2005.
PIFA (arXiv 2501.19090) applies the row variant to language models, and SkipCat (arXiv 2512.13494)
applies this one.
"""

import math
from typing import ClassVar

import torch
from scipy.linalg import lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

from svdserve.compression.format.layouts.base import Factors, InputShare, Layout, Tensors
from svdserve.kernels.parts import other_channels

_POOLS = ThreadpoolController()


class Interpolative(Layout):
    """factor_in is Z, factor_out is C, pivots are the channels of the columns in C."""

    name = "interpolative"
    decoded_when_served = False
    indices: ClassVar[tuple[str, ...]] = ("pivots",)

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"factor_in": (r, n - r), "factor_out": (m, r), "pivots": (r,)}

    def passing(self, r: int) -> int:
        return r

    def _largest(self, m: int, n: int, budget: float) -> int:
        # The smaller root of r (m + n - r) = budget.
        return math.floor(((m + n) - math.sqrt((m + n) ** 2 - 4 * budget)) / 2)

    def encode(self, factors: Factors) -> dict[str, Tensor]:
        """Choose pivots by a column-pivoted QR (LAPACK geqp3) of factor_in V in float64.

        With V Π = Q [R1 R2], Z = R1⁻¹ R2 and C = factor_out · V[:, pivots]. If the numerical rank
        of V is below r, R1 is singular; r is then cut to the numerical rank, which loses nothing.
        If V is zero, one pivot remains, whose column is zero.
        """
        inner = factors.factor_in.double().cpu()
        # Half of the work of a pivoted QR is matrix-vector products. OpenBLAS splits each over
        # threads that wait for each other, which is ten times slower, and takes minutes if other
        # processes share the cores.
        with _POOLS.limit(limits=1, user_api="blas"):
            packed, order, *_ = lapack.dgeqp3(inner.numpy())
        upper = torch.from_numpy(packed[: factors.rank]).triu()
        diagonal = upper.diagonal().abs()
        rank = max(1, int((diagonal > diagonal[0] * 1e-12).sum()))
        if not bool(diagonal[0] > 0):
            upper = torch.eye(*upper.shape, dtype=upper.dtype)  # V is zero: any R1 will do
        # LAPACK counts from 1. With ascending pivots a server need not reorder the factors.
        pivots, rows = torch.from_numpy(order[:rank] - 1).sort()
        columns = torch.from_numpy(order[rank:] - 1).argsort()
        coefficients = torch.linalg.solve_triangular(
            upper[:rank, :rank], upper[:rank, rank:], upper=True
        )[rows][:, columns]
        outer = factors.factor_out.double().cpu() @ inner[:, pivots]
        target = factors.factor_in
        return {
            "factor_in": coefficients.to(target).contiguous(),
            "factor_out": outer.to(factors.factor_out).contiguous(),
            "pivots": pivots.to(device=target.device, dtype=torch.int32),
        }

    def check_indices(self, tensors: Tensors, n: int) -> None:
        pivots = tensors["pivots"]
        if int(pivots.min()) < 0 or int(pivots.max()) >= n:
            raise ValueError(f"pivots must lie in 0..{n - 1}")
        if len(set(pivots.tolist())) != len(pivots):
            raise ValueError("pivots are repeated")

    def input_share(self, indices: Tensors, n: int, channels: range) -> InputShare:
        """Pivots are taken in ascending order, so that each TP rank's are contiguous in z."""
        pivots, latent = indices["pivots"].long().sort()
        rest = other_channels(pivots, n)
        slots, columns = _within(pivots, channels), _within(rest, channels)
        mine = pivots[slots.start : slots.stop], rest[columns.start : columns.stop]
        ascending = bool((latent.diff() > 0).all())
        return InputShare(
            slots,
            slice(columns.start, columns.stop),
            torch.cat(mine) - channels.start,
            None if ascending else latent,
        )


def _within(ascending: Tensor, channels: range) -> range:
    """The positions in a sorted list of channels whose channel lies in ``channels``."""
    bounds = torch.tensor([channels.start, channels.stop])
    start, stop = torch.searchsorted(ascending, bounds).tolist()
    return range(start, stop)
