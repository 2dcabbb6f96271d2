"""Low rank in a two-sided metric: inputs by their Gram matrix, outputs by the loss's curvature.

To second order, changing W by δ costs the loss ½ vec(δ)ᵀ (H ⊗ G) vec(δ) = ½ ‖Cᵀ δ F‖² where
H = F Fᵀ is the Gram matrix of the inputs and G = C Cᵀ that of the gradients at the outputs
(Kronecker-factored Fisher: KFAC, arXiv 1503.05671). The best rank r is C⁻ᵀ [Cᵀ W F]_r F⁻¹.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.methods.registry import Ridge, Solution, method
from svdserve.compression.methods.saes_svd import Beta, Range, beta_needs, solve_shifted
from svdserve.compression.statistics.linalg import left_subspace, shrunk_root
from svdserve.compression.statistics.moments import Statistics

Shrinkage = Annotated[float, Field(ge=0, le=1)]


@method(
    "kfac-svd",
    title="KFAC-SVD",
    paper="https://arxiv.org/abs/2505.17974",
    statistics={"teacher_gram", "gradient_gram"},
)
def kfac_svd(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    shrinkage: Shrinkage = 0.3,
    input_shrinkage: Shrinkage = 0.1,
) -> Solution:
    """C⁻ᵀ [Cᵀ W F]_r F⁻¹ of the teacher's inputs and gradients, both Gram matrices shrunk.

    The metric of GFWSVD with the token-wise gradients, clipping and shrinkage of LEMS (KFAC-SVD,
    ICML 2026), which mend its collapse.

    Args:
        weight: [m, n], float64.
        statistics: Gram matrices of the teacher's inputs and of the gradients.
        rank: 1..min(m, n).
        shrinkage, input_shrinkage: of either Gram matrix towards its mean diagonal.
    """
    assert statistics.teacher_gram is not None
    assert statistics.gradient_gram is not None
    base = weight @ shrunk_root(statistics.teacher_gram, input_shrinkage)
    root = shrunk_root(statistics.gradient_gram, shrinkage)
    return Solution(two_sided(base, weight, root, rank))


@method(
    "saes-kfac",
    title="SAES-SVD in a two-sided metric",
    paper="https://arxiv.org/abs/2602.03051",
    statistics={"gram", "shift", "gradient_gram"},
    extra_statistics=beta_needs,
)
def saes_kfac(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    beta: Beta = 0.25,
    beta_range: Range = (0.25, 0.75),
    ridge: Ridge = 1e-3,
    shrinkage: Shrinkage = 0.3,
) -> Solution:
    """The target of SAES-SVD, G(β) = W F + β W Δ F⁻ᵀ, truncated as Cᵀ G(β).

    A fixed β, as on held-out text it beats ACES and the search that ACES approximates: ρ says how
    much of the target a truncation keeps, not how right the target is, and falls where β adds
    energy to directions that are kept anyway.

    Args:
        weight: [m, n], float64.
        statistics: H and Δ of the module's inputs, and the gradient Gram matrix of its outputs.
        rank: 1..min(m, n).
        beta, beta_range, ridge: as for ``saes-svd``.
        shrinkage: of the gradient Gram matrix towards its mean diagonal (LEMS takes 0.3).
    """
    assert statistics.gradient_gram is not None
    root = shrunk_root(statistics.gradient_gram, shrinkage)

    def truncate(whitened: Tensor, effective: Tensor) -> Factors:
        return two_sided(whitened, effective, root, rank)

    return solve_shifted(weight, statistics, rank, beta, beta_range, ridge, truncate)


def two_sided(whitened: Tensor, weight: Tensor, root: Tensor, rank: int) -> Factors:
    """Factors of C⁻ᵀ U Uᵀ Cᵀ W, U the top left singular vectors of Cᵀ (W F).

    Args:
        whitened: W F [m, n].
        weight: W [m, n].
        root: C [m, m], lower.
        rank: columns of U.
    """
    left, _ = left_subspace(root.mT @ whitened, rank)
    outer = torch.linalg.solve_triangular(root.mT, left, upper=True)
    # An orthonormal factor is the best scaled one in few bits: C⁻ᵀ U = Q R.
    basis, upper = torch.linalg.qr(outer)
    return Factors(factor_in=upper @ (left.mT @ (root.mT @ weight)), factor_out=basis)
