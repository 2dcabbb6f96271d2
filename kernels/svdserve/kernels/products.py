"""The low-rank linear as torch's own products, for every device and dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from svdserve.kernels.parts import Part, PreparedFactors, check_bias, check_input, other_channels


class TwoProducts(PreparedFactors):
    """PreparedFactors that keep the factors as they are and use torch's products."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Keep the factors without a copy; the caller has checked them.

        Args:
            parts: each with its own rank; shapes are those of ``lowrank_linear``.
        """
        super().__init__()
        self.parts = [
            part._replace(factor_in=part.factor_in.detach(), factor_out=part.factor_out.detach())
            for part in parts
        ]
        self.orders = [_order(part) for part in parts]
        self.stored_bytes = sum(p.factor_in.nbytes + p.factor_out.nbytes for p in parts)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., sum of m] of x [..., n]; bias [sum of m] or None."""
        check_input(x, self.parts[0].in_features, self.parts[0].factor_in)
        check_bias(bias, sum(part.outputs for part in self.parts), x)
        if len(self.parts) == 1:
            return _apply(x, self.parts[0], self.orders[0], bias)
        y = torch.cat(
            [_apply(x, p, order, None) for p, order in zip(self.parts, self.orders, strict=True)],
            dim=-1,
        )
        return y if bias is None else y.add_(bias)


def _apply(x: Tensor, part: Part, order: Tensor | None, bias: Tensor | None) -> Tensor:
    if order is None:
        return linear(linear(x, part.factor_in), part.factor_out, bias)
    # On CPU gather is 2 to 4 times faster than index_select along the last dimension.
    x = x.gather(-1, order.expand(*x.shape[:-1], -1))
    z = linear(x[..., part.rank :], part.factor_in).add_(x[..., : part.rank])
    return linear(z, part.factor_out, bias)


def _order(part: Part) -> Tensor | None:
    """The channels (int64), pivots first; None for the pair layout."""
    if part.pivots is None:
        return None
    pivots = part.pivots.long()
    return torch.cat([pivots, other_channels(pivots, part.in_features)])
