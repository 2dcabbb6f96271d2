"""A layout: W = U diag(s) V with rows of V of norm 1, and s [r, 1] as a third matrix."""

from torch import Tensor

from svdserve.compression.format.layouts.base import Factors, Layout, Tensors
from svdserve.kernels import Part


class Scaled(Layout):
    name = "example-scaled"
    matrices = ("factor_in", "factor_out", "sigma")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"factor_in": (r, n), "factor_out": (m, r), "sigma": (r, 1)}

    def encode(self, factors: Factors) -> dict[str, Tensor]:
        norms = factors.factor_in.norm(dim=1, keepdim=True)
        sigma = norms.where(norms > 0, norms.new_ones(()))
        inner = factors.factor_in / sigma
        return {"factor_in": inner, "factor_out": factors.factor_out, "sigma": sigma}

    def part(self, tensors: Tensors) -> Part:
        return Part(tensors["sigma"] * tensors["factor_in"], tensors["factor_out"])


SCALED = Scaled()
