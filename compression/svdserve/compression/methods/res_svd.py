"""ResSVD: residual compensation (arXiv 2505.20112, later ERC-SVD), its first part."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.methods.registry import Ridge, Solution, method
from svdserve.compression.statistics.linalg import left_subspace, whiten
from svdserve.compression.statistics.moments import Statistics

Metric = Callable[[Tensor], Tensor]
"""Maps M [m, n] to M F; the truncation error is measured as ‖(M − M̂) F‖_F."""

MetricName = Literal["plain", "whitened"]
Share = Annotated[float, Field(ge=0, le=1)]
"""Rank of the residual divided by the break-even rank mn / (m + n)."""


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
    residual_share: Share = 0.05,
    metric: MetricName = "whitened",
    residual_metric: MetricName = "plain",
    ridge: Ridge = 1e-3,
) -> Solution:
    """Truncate W to W_{r1}, then the residual W − W_{r1} to rank r2; r1 + r2 = r.

    Args:
        weight: [m, n], float64.
        statistics: Gram matrix H of the module's inputs.
        rank: r, in 1..min(m, n).
        residual_share: r2 / (mn / (m + n)); the default is the paper's 0.05.
        metric, residual_metric: metrics of the two truncations. With equal metrics the sum would be
            the rank-r truncation itself (Eckart and Young).
        ridge: λ / mean(diag H).
    """
    assert statistics.gram is not None
    whitening = whiten(statistics.gram, ridge)
    metrics: dict[str, Metric] = {"plain": lambda m: m, "whitened": lambda m: m @ whitening.root}
    factors = compensated(weight, rank, residual_share, metrics[metric], metrics[residual_metric])
    return Solution(factors, {"damping": whitening.damping})


def compensated(weight: Tensor, rank: int, share: float, first: Metric, second: Metric) -> Factors:
    """Factors [m, r] · [r, n] of W_{r1} + R_{r2}; both truncations are projections U Uᵀ.

    Args:
        weight: W [m, n].
        rank: r = r1 + r2, where r1 is at least 1.
        share: r2 / (mn / (m + n)).
        first: metric in which W is truncated to W_{r1}.
        second: metric in which R = W − W_{r1} is truncated.
    """
    m, n = weight.shape
    extra = min(round(share * m * n / (m + n)), rank - 1)
    left, _ = left_subspace(first(weight), rank - extra)
    outer, inner = [left], [left.mT @ weight]
    if extra:
        residual = weight - left @ inner[0]
        left, _ = left_subspace(second(residual), extra)
        outer.append(left)
        inner.append(left.mT @ residual)
    return Factors(factor_in=torch.cat(inner), factor_out=torch.cat(outer, dim=1))
