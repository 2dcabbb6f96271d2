"""Layouts: how a weight of rank r becomes the matrices and indices that store it, and back.

A weight W is [m, n] = [out, in] and y = W x. The latent z [r] is the vector between the two factors
of W. A layout defines the tensors, their number of parameters, and the form that svdserve.kernels
multiplies (``Part``): z = V x or z = x[pivots] + Z x[rest], and y = factor_out z. A codec encodes
the matrices; indices are int32 and are stored unchanged.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdserve.kernels.parts import Part, other_channels
from svdserve.kernels.reference import Rounding, project

_ROUNDING = 1e-6  # parameters

Tensors = Mapping[str, Tensor]
"""Decoded matrices and indices of one module, by suffix."""


@dataclass(frozen=True)
class Factors:
    """W = factor_out · factor_in, [m, r] · [r, n]: the result of a method, for every layout."""

    factor_in: Tensor
    factor_out: Tensor

    @property
    def rank(self) -> int:
        return self.factor_out.shape[1]

    def dense(self) -> Tensor:
        """The weight [m, n]."""
        return self.factor_out @ self.factor_in

    def to(self, dtype: torch.dtype) -> "Factors":
        return Factors(self.factor_in.to(dtype), self.factor_out.to(dtype))


@dataclass(frozen=True)
class InputShare:
    """How a TP rank computes its summand of the latent from its input channels.

    Let x be the TP rank's channels in ``order``. The first ``len(slots)`` of them are added to the
    latent at ``slots``; the others are multiplied with ``columns`` of factor_in.

    Attributes:
        slots: positions in z of the channels that are added unchanged; empty for ``pair``.
        columns: columns of factor_in for the TP rank's other channels.
        order: order of the TP rank's channels (int64), counted from its first channel; None for
            the original order.
        latent: order in which to take the rows of factor_in and the columns of factor_out (int64);
            None for the stored order.
    """

    slots: range
    columns: slice
    order: Tensor | None = None
    latent: Tensor | None = None


class Layout(ABC):
    """One way to store a weight of rank r.

    Attributes:
        name: the name in recipes and checkpoints.
        matrices: suffixes of the matrices. A layout whose matrices are not ``factor_in`` and
            ``factor_out`` must define ``part``.
        indices: suffixes of the int32 vectors.
        decoded_when_served: whether a server must compute ``part`` when it loads a module. If
            False, the stored matrices are those of ``part``, and each TP rank reads only its share.
    """

    name: ClassVar[str]
    matrices: ClassVar[tuple[str, ...]] = ("factor_in", "factor_out")
    indices: ClassVar[tuple[str, ...]] = ()
    decoded_when_served: ClassVar[bool] = True

    @abstractmethod
    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the matrices and the indices of a weight [m, n] of rank r, by suffix."""

    @abstractmethod
    def encode(self, factors: Factors) -> dict[str, Tensor]:
        """Matrices and indices by suffix, equal to the pair up to rounding; the rank may fall."""

    def passing(self, r: int) -> int:  # noqa: ARG002 (none in most layouts)
        """Number of input channels that are added to the latent unchanged: 0 or r."""
        return 0

    def rank(self, tensors: Tensors) -> int:
        """The rank of a module with these tensors, encoded or not."""
        return tensors["factor_out"].shape[1]

    def parameters(self, m: int, n: int, r: int) -> int:
        """Number of elements in the matrices; indices do not count."""
        shapes = self.shapes(m, n, r)
        return sum(torch.Size(shapes[suffix]).numel() for suffix in self.matrices)

    def rank_for_keep(self, m: int, n: int, keep: float) -> int | None:
        """The largest rank, at least 1, that stores at most ``keep`` of the dense parameters.

        None if the weight should stay dense: the keep ratio is 1, or the factors of that rank would
        have as many parameters as the weight itself.
        """
        if keep >= 1:
            return None
        rank = max(1, min(self._largest(m, n, keep * m * n), m, n))
        return rank if self.parameters(m, n, rank) < m * n else None

    def _largest(self, m: int, n: int, budget: float) -> int:
        """The largest rank with at most ``budget`` parameters; 0 if there is none."""
        low, high = 0, min(m, n)
        while low < high:
            middle = (low + high + 1) // 2
            if self.parameters(m, n, middle) <= budget + _ROUNDING:
                low = middle
            else:
                high = middle - 1
        return low

    def balanced(self, tensors: Tensors) -> Tensors:
        """Matrices of the same weight, scaled so that they overflow a narrow dtype less easily."""
        return tensors

    def check_indices(self, tensors: Tensors, n: int) -> None:  # noqa: B027 (most have none)
        """Refuse indices that do not fit ``n`` input channels.

        Raises:
            ValueError: the indices do not fit; the message says why.
        """

    def part(self, tensors: Tensors) -> Part:
        """The tensors in the form that svdserve.kernels multiplies."""
        return Part(tensors["factor_in"], tensors["factor_out"], tensors.get("pivots"))

    def multiplied(self, tensors: Tensors, n: int) -> Tensor | None:
        """The input channels (int64) that factor_in multiplies.

        None for a layout whose stored matrices are not those that the kernels multiply.
        """
        if self.decoded_when_served or self.matrices != ("factor_in", "factor_out"):
            return None
        pivots = self.part(tensors).pivots
        if pivots is None:
            return torch.arange(n, device=tensors["factor_in"].device)
        return other_channels(pivots, n)

    def latent(self, x: Tensor, tensors: Tensors, round_input: Rounding | None = None) -> Tensor:
        """The latent [..., r] of x [..., n]; ``round_input`` is as for ``project``."""
        part = self.part(tensors)
        return project(x, part.factor_in, part.pivots, round_input)

    def dense(self, tensors: Tensors) -> Tensor:
        """The weight [m, n], in the dtype of the matrices."""
        part = self.part(tensors)
        if part.pivots is None:
            return part.factor_out @ part.factor_in
        pivots = part.pivots.long()
        weight = part.factor_out.new_empty(part.outputs, part.in_features)
        weight[:, pivots] = part.factor_out
        weight[:, other_channels(pivots, part.in_features)] = part.factor_out @ part.factor_in
        return weight

    def input_share(self, indices: Tensors, n: int, channels: range) -> InputShare:
        """How a TP rank that holds ``channels`` of the n input channels computes its latent.

        Args:
            indices: all indices of the module, by suffix.
        """
        del indices, n
        return InputShare(range(0), slice(channels.start, channels.stop))
