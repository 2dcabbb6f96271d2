"""Plain truncated SVD of the weight (Eckart and Young, Psychometrika 1936)."""

from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.methods.registry import Solution, method
from svdserve.compression.statistics.linalg import left_subspace
from svdserve.compression.statistics.moments import Statistics


@method(
    "svd",
    title="Truncated SVD",
    paper="https://doi.org/10.1007/BF02288367",
    statistics=set(),
)
def svd(weight: Tensor, _statistics: Statistics, rank: int) -> Solution:
    """Ŵ = U_r U_rᵀ W, the best rank-r approximation of the weight; the inputs are ignored."""
    left, _ = left_subspace(weight, rank)
    return Solution(Factors(factor_in=left.mT @ weight, factor_out=left))
