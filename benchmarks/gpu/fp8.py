"""The same products in fp8 (e4m3), with a scale for each row, for comparison on a GPU.

Weights and inputs are in fp8, and torch's scaled product multiplies them, as in vLLM's W8A8 layers.
One compiled function rounds the inputs; for low rank it also adds the pivots. The inputs of the
low-rank side are in order, pivots first.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

_LARGEST = 448.0  # of e4m3


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=1e-12)
    return (wide / scale).to(torch.float8_e4m3fn), scale


def _sum_rounded(z: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    return _rounded(z + pivots)


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return torch.compile(_rounded, dynamic=True), torch.compile(_sum_rounded, dynamic=True)


def _product(x: Tensor, scale: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
    own, own_scale = weight
    return torch._scaled_mm(
        x, own.T, scale, own_scale.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _dense(weight: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return _product(*_compiled()[0](x), weight)


def _low_rank(
    inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor], rank: int, x: Tensor
) -> Tensor:
    rounded, with_sum = _compiled()
    z = _product(*rounded(x[:, rank:]), inner)
    return _product(*with_sum(z, x[:, :rank]), outer)


def contenders(
    dense: Sequence[Tensor],
    factors: Sequence[tuple[Tensor, Tensor]],
    x: Tensor,
    in_order: Tensor,
) -> dict[str, list[Callable[[], Tensor]]]:
    """Calls of the dense and of the low-rank product.

    Args:
        dense: copies of a weight [m, n].
        factors: copies of factor_in [r, n - r] and factor_out [m, r], sizes multiples of 16.
        x: [rows, n].
        in_order: [rows, n], pivots first.
    """
    rounded = [_rounded(weight) for weight in dense]
    pairs = [(_rounded(inner), _rounded(outer)) for inner, outer in factors]
    rank = factors[0][0].shape[0]
    return {
        "dense fp8": [partial(_dense, weight, x) for weight in rounded],
        "products in order, fp8": [partial(_low_rank, i, o, rank, in_order) for i, o in pairs],
    }
