"""Truncation in a two-sided metric: the inputs' Gram matrix and the curvature of the loss.

To second order, a change δ of W changes the loss by ½ vec(δ)ᵀ (H ⊗ G) vec(δ) = ½ ‖Cᵀ δ F‖², where
H = F Fᵀ is the Gram matrix of the inputs and G = C Cᵀ is the Gram matrix of the gradients at the
outputs (Kronecker-factored Fisher information: KFAC, arXiv 1503.05671). The best approximation of
rank r is C⁻ᵀ [Cᵀ W F]_r F⁻¹.
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
    """C⁻ᵀ [Cᵀ W F]_r F⁻¹ with shrunk Gram matrices of the teacher's inputs and gradients.

    This is the metric of GFWSVD with the token-wise gradients, clipping and shrinkage of LEMS
    (KFAC-SVD, ICML 2026), without which the metric collapses.

    Args:
        weight: [m, n], float64.
        statistics: Gram matrices of the teacher's inputs and of the gradients.
        rank: r, in 1..min(m, n).
        shrinkage: shrinkage of the gradients' Gram matrix towards its mean diagonal.
        input_shrinkage: the same for the inputs' Gram matrix.
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

    The default β is fixed, because it gives better results on held-out text than ACES or the search
    that ACES approximates. Both minimise the dropped share of the target's energy. That share does
    not measure how good the target is, and it falls if β adds energy to kept directions.

    Args:
        weight: [m, n], float64.
        statistics: H and Δ of the module's inputs, and the Gram matrix of the gradients at its
            outputs.
        rank: r, in 1..min(m, n).
        beta, beta_range, ridge: as for ``saes-svd``.
        shrinkage: shrinkage of the gradients' Gram matrix towards its mean diagonal (0.3 in LEMS).
    """
    assert statistics.gradient_gram is not None
    root = shrunk_root(statistics.gradient_gram, shrinkage)

    def truncate(whitened: Tensor, effective: Tensor) -> Factors:
        return two_sided(whitened, effective, root, rank)

    return solve_shifted(weight, statistics, rank, beta, beta_range, ridge, truncate)


def two_sided(whitened: Tensor, weight: Tensor, root: Tensor, rank: int) -> Factors:
    """Factors of C⁻ᵀ U Uᵀ Cᵀ W, where U [m, r] are the top left singular vectors of Cᵀ W F.

    Args:
        whitened: W F [m, n].
        weight: W [m, n].
        root: C [m, m], lower triangular.
        rank: r, the number of columns of U.
    """
    left, _ = left_subspace(root.mT @ whitened, rank)
    outer = torch.linalg.solve_triangular(root.mT, left, upper=True)
    # C⁻ᵀ U = Q R: a factor with orthonormal columns loses least when it is stored in few bits.
    basis, upper = torch.linalg.qr(outer)
    return Factors(factor_in=upper @ (left.mT @ (root.mT @ weight)), factor_out=basis)
