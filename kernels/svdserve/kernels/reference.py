"""The definition of a low-rank linear in plain torch, for tests, training and autocast."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, pad, silu

from svdserve.kernels.parts import Activation, Int8Matrix, Int8Part, WholePart

Rounding = Callable[[Tensor], Tensor]
"""Takes x [..., n] and returns it as a product with encoded weights rounds it."""

GROUP = 64  # columns of x that share a scale when they are rounded
_SMALLEST = 1e-36  # below it 127 / peak is not finite in float32, and a group counts as zeros


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


def project(
    x: Tensor,
    factor_in: Tensor,
    pivots: Tensor | None = None,
    round_input: Rounding | None = None,
) -> Tensor:
    """The latent z [..., r] between the two products: V x, or x[pivots] + Z x[rest].

    ``round_input`` rounds what is multiplied, x or x[rest]; None leaves it as it is.
    """
    if pivots is None:
        return linear(straight_through(x, round_input), factor_in)
    pivots = pivots.long()
    rest = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device)
    rest[pivots] = False
    if round_input is not None:
        x = straight_through(x, partial(_round_at, rest, round_input))
    if torch.is_grad_enabled() and factor_in.requires_grad:
        # In training the gradient of a gather costs more than the products that the gather saves.
        identity = torch.eye(len(pivots), dtype=factor_in.dtype, device=x.device)
        whole = factor_in.new_zeros(len(pivots), len(rest)).index_copy(1, pivots, identity)
        return linear(x, whole.index_copy(1, rest.nonzero().squeeze(1), factor_in))
    return x[..., pivots] + linear(x[..., rest], factor_in)


def _round_at(rest: Tensor, round_input: Rounding, x: Tensor) -> Tensor:
    """x [..., n] with ``round_input`` at the channels of the mask ``rest`` [n]."""
    values = x.clone()
    values[..., rest] = round_input(x[..., rest]).to(x.dtype)
    return values


def straight_through(x: Tensor, round_input: Rounding | None) -> Tensor:
    """``round_input(x)`` in the dtype of x, whose gradient is that of x.

    Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013.
    """
    if round_input is None:
        return x
    values = round_input(x.detach()).to(x.dtype)
    return x + (values - x).detach() if torch.is_grad_enabled() and x.requires_grad else values


def rounded(x: Tensor) -> Tensor:
    """x [..., n] rounded to int8 and back, with a scale for each token and 64 columns.

    The scale is the group's largest magnitude / 127. The activations of language models have a few
    columns that are a hundred times larger than the rest; one scale for a whole token, which vLLM's
    int8 products use, would leave few of the other columns' digits.

    Returns:
        [..., n] in float32, or in float64 if x is float64.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    columns = x.shape[-1]
    groups = pad(wide, (0, -columns % GROUP)).reshape(*x.shape[:-1], -(-columns // GROUP), GROUP)
    peak = groups.abs().amax(dim=-1, keepdim=True)
    zero = peak < _SMALLEST
    levels = (groups * torch.where(zero, 0, 127 / torch.where(zero, 1, peak))).round()
    return (levels * torch.where(zero, 0, peak / 127)).flatten(-2)[..., :columns]


def int8_linear(x: Tensor, part: Int8Part | WholePart, bias: Tensor | None = None) -> Tensor:
    """y = W x + b for int8 weights, with activations rounded to int8 as well.

    x[rest] and the latent are ``rounded``; x[pivots] are added to the latent before, unrounded.
    Sums are in float32, or in float64 if x is float64.

    Args:
        x: [..., n].
        part: the weights, all in int8.
        bias: [m] or None.

    Returns:
        [..., m] in the dtype of x.
    """
    exact = torch.promote_types(x.dtype, torch.float32)

    def decoded(matrix: Tensor | Int8Matrix) -> Tensor:
        assert isinstance(matrix, Int8Matrix)
        return matrix.values.to(exact) * matrix.scale.to(exact)[:, None]

    z = x.to(exact)
    if isinstance(part, WholePart):
        outer = decoded(part.weight)
    else:
        z = project(z, decoded(part.factor_in), part.pivots, rounded)
        outer = decoded(part.factor_out)
    y = linear(rounded(z), outer)
    return (y if bias is None else y + bias.to(exact)).to(x.dtype)


def gated(y: Tensor, activation: Activation) -> Tensor:
    """act(gate) * up [..., m / 2], from the outputs y [..., m] of a gated MLP's first layer."""
    gate, up = y.chunk(2, dim=-1)
    return (silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")) * up
