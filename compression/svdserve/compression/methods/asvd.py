"""ASVD: activation-aware SVD (Yuan et al., arXiv 2312.05821)."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.methods.registry import Solution, method
from svdserve.compression.statistics.linalg import left_subspace
from svdserve.compression.statistics.moments import Statistics

Alpha = Annotated[float, Field(ge=0, le=1)]

_FLOOR = 1e-6  # times the mean scale: the least scale, so that a silent channel can be inverted


@method(
    "asvd",
    title="ASVD",
    paper="https://arxiv.org/abs/2312.05821",
    statistics={"teacher_magnitude"},
)
def asvd(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    alpha: Alpha = 0.5,
) -> Solution:
    """Truncate the SVD of W S with S = diag(mean |x|)^α; Ŵ = U_r U_rᵀ W (S cancels).

    The paper's search for ranks by the perplexity of each layer is left out.
    """
    left, _ = left_subspace(weight * channel_scale(statistics, alpha), rank)
    return Solution(Factors(factor_in=left.mT @ weight, factor_out=left))


def channel_scale(statistics: Statistics, alpha: float) -> Tensor:
    """The diagonal [n] of S, positive."""
    assert statistics.teacher_magnitude is not None
    scale = statistics.teacher_magnitude.double() ** alpha
    return scale.clamp_min(_FLOOR * float(scale.mean())).clamp_min(1e-30)
