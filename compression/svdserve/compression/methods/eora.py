"""EoRA: eigenspace low-rank approximation of a compression's error (arXiv 2410.21271)."""

from typing import Literal

from torch import Tensor

from svdserve.compression.methods.asvd import Alpha, channel_scale
from svdserve.compression.methods.registry import Solution, method
from svdserve.compression.methods.res_svd import Share, compensated
from svdserve.compression.statistics.linalg import eigen_root
from svdserve.compression.statistics.moments import Statistics


@method(
    "eora",
    title="EoRA",
    paper="https://arxiv.org/abs/2410.21271",
    statistics={"gram", "teacher_magnitude"},
)
def eora(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    base: Literal["svd", "asvd"] = "svd",
    alpha: Alpha = 0.5,
    residual_share: Share = 0.0625,
) -> Solution:
    """A base Ŵ of rank r1, plus ΔW = W − Ŵ truncated to rank r2 in the eigenspace of the inputs.

    With H = Q Λ Qᵀ the paper adds [ΔW Q √Λ]_{r2} (Q √Λ)⁻¹. This equals U Uᵀ ΔW, where U are the top
    left singular vectors of ΔW Q √Λ.

    Args:
        weight: [m, n], float64.
        statistics: Gram matrix H of the student's inputs, and mean |x| of the teacher's inputs.
        rank: r = r1 + r2, in 1..min(m, n).
        base: method of the base: plain SVD, or ASVD with ``alpha``.
        residual_share: r2 / (mn / (m + n)); the default is the paper's rank 128 for m = n = 4096.
    """
    assert statistics.gram is not None
    root = eigen_root(statistics.gram)
    scale = channel_scale(statistics, alpha) if base == "asvd" else 1.0
    return Solution(
        compensated(weight, rank, residual_share, lambda m: m * scale, lambda m: m @ root)
    )
