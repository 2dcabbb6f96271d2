"""The layout ``pair``: W = U V with U [m, r] and V [r, n]; r (m + n) parameters."""

import math

import torch
from torch import Tensor

from svdserve.compression.format.layouts.base import Factors, Layout, Tensors


class Pair(Layout):
    """factor_in is V, factor_out is U."""

    name = "pair"
    decoded_when_served = False

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"factor_in": (r, n), "factor_out": (m, r)}

    def encode(self, factors: Factors) -> dict[str, Tensor]:
        return {"factor_in": factors.factor_in, "factor_out": factors.factor_out}

    def _largest(self, m: int, n: int, budget: float) -> int:
        return math.floor(budget / (m + n))

    def balanced(self, tensors: Tensors) -> Tensors:
        """Scale rows of V and columns of U so that each pair's norms differ at most by 2×."""
        inner, outer = tensors["factor_in"], tensors["factor_out"]
        exponents = torch.log2(outer.norm(dim=0) / inner.norm(dim=1)) / 2
        # Scaling by a power of two does not round.
        scale = torch.exp2(exponents.nan_to_num(0.0, 0.0, 0.0).round())
        return {"factor_in": inner * scale[:, None], "factor_out": outer / scale}
