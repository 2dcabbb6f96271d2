"""ResSVD: residual compensation (arXiv 2505.20112, later ERC-SVD), its first part."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from svdserve.compression.factors import Factors
from svdserve.compression.linalg import left_subspace, whiten
from svdserve.compression.methods.registry import Ridge, Solution, method
from svdserve.compression.statistics import Statistics


@method(
    "res-svd",
    title="ResSVD",
    paper="https://arxiv.org/abs/2505.20112",
    statistics={"gram"},
)
def res_svd(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    residual_share: Annotated[float, Field(ge=0, le=1)] = 0.05,
    residual_metric: Literal["plain", "whitened"] = "plain",
    ridge: Ridge = 1e-3,
) -> Solution:
    """W_{r1} by the whitened SVD of W, then the residual W − W_{r1} to rank r2; r1 + r2 = r.

    Args:
        weight: [m, n], float64.
        statistics: H of the module's inputs.
        rank: r, 1..min(m, n).
        residual_share: r2 over the break-even rank mn / (m + n); the paper's 0.05.
        residual_metric: of the second truncation. In the metric of the first one the sum is the
            rank-r truncation itself (Eckart and Young), so only ``plain`` changes anything.
        ridge: λ over the mean of diag H.
    """
    assert statistics.gram is not None
    m, n = weight.shape
    second = min(round(residual_share * m * n / (m + n)), rank - 1)
    whitening = whiten(statistics.gram, ridge)
    left, _ = left_subspace(weight @ whitening.root, rank - second)
    outer, inner = [left], [left.mT @ weight]
    if second:
        residual = weight - left @ inner[0]
        metric = residual if residual_metric == "plain" else residual @ whitening.root
        left, _ = left_subspace(metric, second)
        outer.append(left)
        inner.append(left.mT @ residual)
    return Solution(
        Factors(factor_in=torch.cat(inner), factor_out=torch.cat(outer, dim=1)),
        {"damping": whitening.damping},
    )
