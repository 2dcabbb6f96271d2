"""AA-SVD: anchored and adaptive SVD (arXiv 2604.02119), without its block refinement."""

from torch import Tensor

from svdserve.compression.methods.registry import Ridge, Solution, method
from svdserve.compression.methods.saes_svd import saes_svd
from svdserve.compression.statistics.moments import Statistics


@method(
    "aa-svd",
    title="AA-SVD",
    paper="https://arxiv.org/abs/2604.02119",
    statistics={"gram", "shift"},
)
def aa_svd(weight: Tensor, statistics: Statistics, rank: int, *, ridge: Ridge = 1e-3) -> Solution:
    """Minimise ‖W X_f − Ŵ X‖_F, the paper's objective 4; this is SAES-SVD's CEALC with β = 1."""
    return saes_svd(weight, statistics, rank, beta=1.0, ridge=ridge)
