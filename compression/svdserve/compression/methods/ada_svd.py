"""AdaSVD: adaptive compensation by alternating updates (arXiv 2502.01403)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.methods.registry import Ridge, Solution, method
from svdserve.compression.statistics.linalg import left_subspace, whiten
from svdserve.compression.statistics.moments import Statistics


@method(
    "ada-svd",
    title="AdaSVD",
    paper="https://arxiv.org/abs/2502.01403",
    statistics={"gram"},
)
def ada_svd(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    iterations: Annotated[int, Field(ge=0, le=100)] = 1,
    ridge: Ridge = 1e-3,
) -> Solution:
    """Minimise ‖(W − U V) X‖_F over U and V in turn, starting from the plain SVD.

    U = W H Vᵀ (V H Vᵀ)⁻¹ and V = U⁺ W. The whitened SVD is the optimum of this objective already,
    so starting from it would change nothing. The paper's rank allocation is left out.
    """
    assert statistics.gram is not None
    whitening = whiten(statistics.gram, ridge)
    outer, _ = left_subspace(weight, rank)
    inner = outer.mT @ weight
    for _ in range(iterations):
        seen = inner @ whitening.root
        outer = torch.linalg.lstsq(
            seen.mT, (weight @ whitening.root).mT, driver="gelsd"
        ).solution.mT
        inner = torch.linalg.lstsq(outer, weight, driver="gelsd").solution
    return Solution(Factors(factor_in=inner, factor_out=outer), {"damping": whitening.damping})
