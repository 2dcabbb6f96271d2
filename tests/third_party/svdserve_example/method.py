"""A method: the SVD of the weight, its columns scaled by the root mean square of their inputs."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.methods.registry import Solution, method
from svdserve.compression.statistics.linalg import left_subspace
from svdserve.compression.statistics.moments import Statistics


@method(
    "example-rms",
    title="SVD scaled by the inputs' root mean square",
    paper="https://example.org/paper",
    statistics={"teacher_gram"},
)
def rms(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    power: Annotated[float, Field(ge=0, le=2)] = 1.0,
) -> Solution:
    """Ŵ = U_r U_rᵀ W with U_r from the SVD of W Dᵖ, D_jj² = E[x_j²]."""
    assert statistics.teacher_gram is not None
    scale = statistics.teacher_gram.diagonal().clamp(min=0).sqrt() ** power
    left, _ = left_subspace(weight * scale, rank)
    return Solution(Factors(factor_in=left.mT @ weight, factor_out=left))
