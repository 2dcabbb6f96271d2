"""The layout ``interpolative``: r columns of W themselves, and how the others follow from them.

W = C [I Z] Πᵀ with C = W[:, pivots] stored as factor_out [m, r] and Z as factor_in [r, n - r];
y = C (x[pivots] + Z x[rest]), where ``rest`` are the other input channels in ascending order. It
stores r² parameters fewer than a pair and is lossless: column interpolative decomposition, Cheng et
al., "On the compression of low rank matrices", SIAM J. Sci. Comput. 2005. PIFA (arXiv 2501.19090)
applies the row variant to language models, SkipCat (arXiv 2512.13494) this one.
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
        """Pivots come from a column-pivoted QR (LAPACK geqp3) of factor_in in float64.

        With V Π = Q [R1 R2], Z = R1⁻¹ R2 and C = factor_out · V[:, pivots]. A factor_in of
        numerical rank below r leaves a singular R1; its rank is then cut to the numerical one,
        which loses nothing. A factor_in of zeros keeps one pivot, whose column is zero.
        """
        inner = factors.factor_in.double().cpu()
        # Half of a pivoted QR is matrix times vector. OpenBLAS splits each into threads that then
        # wait for each other: ten times slower, and minutes where other work shares the cores.
        with _POOLS.limit(limits=1, user_api="blas"):
            packed, order, *_ = lapack.dgeqp3(inner.numpy())
        upper = torch.from_numpy(packed[: factors.rank]).triu()
        diagonal = upper.diagonal().abs()
        rank = max(1, int((diagonal > diagonal[0] * 1e-12).sum()))
        if not bool(diagonal[0] > 0):
            upper = torch.eye(*upper.shape, dtype=upper.dtype)  # Z = 0: zeros give nothing
        # LAPACK counts from 1. Ascending pivots spare a server sorting the factors when it loads.
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
        """Pivots ascend in the share, so that those of each rank stand side by side in z."""
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
    """The positions in an ascending list of channels that fall into ``channels``."""
    bounds = torch.tensor([channels.start, channels.stop])
    start, stop = torch.searchsorted(ascending, bounds).tolist()
    return range(start, stop)
