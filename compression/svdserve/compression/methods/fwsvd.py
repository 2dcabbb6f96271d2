"""FWSVD (arXiv 2207.00112, ICLR 2022): rows weighted by their Fisher information."""

from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.methods.registry import Solution, method
from svdserve.compression.statistics.linalg import left_subspace
from svdserve.compression.statistics.moments import Statistics


@method(
    "fwsvd",
    title="FWSVD",
    paper="https://arxiv.org/abs/2207.00112",
    statistics={"row_fisher"},
)
def fwsvd(weight: Tensor, statistics: Statistics, rank: int) -> Solution:
    """Î⁻¹ [Î W]_r, where Î_ii is the root of the Fisher information of row i (equation 7).

    Rows without any Fisher information get the smallest weight of all other rows.

    Args:
        weight: [m, n], float64.
        statistics: the row Fisher information of the module.
        rank: r, in 1..min(m, n).
    """
    assert statistics.row_fisher is not None
    fisher = statistics.row_fisher.double()
    seen = fisher[fisher > 0]
    scale = fisher.clamp_min(seen.min() if len(seen) else 1.0).sqrt()[:, None]
    left, _ = left_subspace(scale * weight, rank)
    return Solution(Factors(factor_in=left.mT @ (scale * weight), factor_out=left / scale))
