"""The definition of a low-rank linear in plain torch, for tests, training and autocast."""

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from svdserve.kernels.parts import Activation


def lowrank_linear(
    x: Tensor,
    factor_in: Tensor,
    factor_out: Tensor,
    pivots: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = W x + b for a rank-r weight W [m, n]: W = U V, or W x = C (x[pivots] + Z x[rest]).

    Args:
        x: [..., n].
        factor_in: V [r, n], or Z [r, n - r] with pivots.
        factor_out: U [m, r], or C [m, r] with pivots.
        pivots: [r] distinct channels of x, or None for the pair layout.
        bias: [m] or None.

    Returns:
        [..., m] in the dtype of x.
    """
    return linear(project(x, factor_in, pivots), factor_out, bias)


def project(x: Tensor, factor_in: Tensor, pivots: Tensor | None = None) -> Tensor:
    """The latent z [..., r] between the two products: V x, or x[pivots] + Z x[rest]."""
    if pivots is None:
        return linear(x, factor_in)
    pivots = pivots.long()
    rest = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device)
    rest[pivots] = False
    if torch.is_grad_enabled() and factor_in.requires_grad:
        # In training the gradient of a gather costs more than the products that the gather saves.
        identity = torch.eye(len(pivots), dtype=factor_in.dtype, device=x.device)
        whole = factor_in.new_zeros(len(pivots), len(rest)).index_copy(1, pivots, identity)
        return linear(x, whole.index_copy(1, rest.nonzero().squeeze(1), factor_in))
    return x[..., pivots] + linear(x[..., rest], factor_in)


def gated(y: Tensor, activation: Activation) -> Tensor:
    """act(gate) * up [..., m / 2], from the outputs y [..., m] of a gated MLP's first layer."""
    gate, up = y.chunk(2, dim=-1)
    return (silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")) * up
