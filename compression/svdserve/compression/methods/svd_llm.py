"""SVD-LLM: truncation-aware data whitening (Wang et al., arXiv 2403.07378, ICLR 2025)."""

from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.methods.registry import Ridge, Solution, method
from svdserve.compression.statistics.linalg import left_subspace, whiten
from svdserve.compression.statistics.moments import Statistics


@method(
    "svd-llm",
    title="SVD-LLM (W)",
    paper="https://arxiv.org/abs/2403.07378",
    statistics={"teacher_gram"},
)
def svd_llm(weight: Tensor, statistics: Statistics, rank: int, *, ridge: Ridge = 1e-6) -> Solution:
    """Truncate the SVD of W F with F Fᵀ = X_f X_fᵀ, where X_f are the teacher's inputs.

    Ŵ = U_r U_rᵀ W with U_r from W F equals the paper's U_r Σ_r V_rᵀ F⁻¹ in exact arithmetic.
    ``ridge`` is relative to the mean of the diagonal; the paper damps only on failure.
    """
    assert statistics.teacher_gram is not None
    whitening = whiten(statistics.teacher_gram, ridge)
    left, _ = left_subspace(weight @ whitening.root, rank)
    return Solution(
        Factors(factor_in=left.mT @ weight, factor_out=left), {"damping": whitening.damping}
    )
