"""What a layout is: a weight of rank r to the matrices and indices that store it, and back.

Shapes: a weight W is [m, n] = [out, in], y = W x, and the latent z is the rank-r vector between the
two factors of W. A layout says which tensors there are, how many parameters they hold, and how they
become what svdserve.kernels multiplies (``Part``): z = V x, or z = x[pivots] + Z x[rest], and
y = factor_out z. A codec encodes the matrices; indices are int32 and stay as they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdserve.kernels.parts import Part, other_channels
from svdserve.kernels.reference import project

Tensors = Mapping[str, Tensor]
"""Decoded matrices and indices of one module, by suffix."""


@dataclass(frozen=True)
class Factors:
    """W = factor_out · factor_in, [m, r] · [r, n]: what a method returns, whatever the layout."""

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
    """How a TP rank computes its part of the latent from its input channels.

    With x the rank's channels in ``order``, the first ``len(slots)`` of them are added to the
    latent at ``slots``, and the others are multiplied with ``columns`` of factor_in.

    Attributes:
        slots: places in z of the channels that pass as they are; empty for ``pair``.
        columns: of factor_in, for the rank's other channels.
        order: of the rank's channels (int64), counted from its first; None for as they come.
        latent: order in which factor_in's rows and factor_out's columns are to be taken (int64),
            where it is not the stored one.
    """

    slots: range
    columns: slice
    order: Tensor | None = None
    latent: Tensor | None = None


class Layout(ABC):
    """One way to store a weight of rank r.

    Attributes:
        name: in recipes and checkpoints.
        matrices: suffixes of the matrices. A layout with others than ``factor_in`` and
            ``factor_out`` must give ``part``.
        indices: suffixes of the int32 vectors.
        decoded_when_served: whether a server must compute ``part`` when it loads a module. Where
            not, the stored matrices are those of ``part``, and each TP rank reads only its own.
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
        """Matrices and indices of a pair, equal to it up to rounding; the rank may fall."""

    def passing(self, r: int) -> int:  # noqa: ARG002 (none in most layouts)
        """How many input channels enter the latent as they are; 0 or r."""
        return 0

    def rank(self, tensors: Tensors) -> int:
        """The rank of a module with these tensors, encoded or not."""
        return tensors["factor_out"].shape[1]

    def parameters(self, m: int, n: int, r: int) -> int:
        """Numbers in the matrices; indices are no parameters."""
        shapes = self.shapes(m, n, r)
        return sum(torch.Size(shapes[suffix]).numel() for suffix in self.matrices)

    def rank_for_keep(self, m: int, n: int, keep: float) -> int | None:
        """The largest rank that stores at most ``keep`` of the dense parameters, at least 1.

        None where the weight is better left dense: the keep ratio is 1, or factors of that rank
        would store as much as the weight itself.
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
            low, high = (
                (middle, high) if self.parameters(m, n, middle) <= budget else (low, middle - 1)
            )
        return low

    def balanced(self, tensors: Tensors) -> Tensors:
        """The same weight from matrices whose numbers a narrower dtype can rather hold."""
        return tensors

    def check_indices(self, tensors: Tensors, n: int) -> None:  # noqa: B027 (most have none)
        """Refuse indices that do not fit ``n`` input channels.

        Raises:
            ValueError: says what is wrong.
        """

    def part(self, tensors: Tensors) -> Part:
        """What svdserve.kernels multiplies."""
        return Part(tensors["factor_in"], tensors["factor_out"], tensors.get("pivots"))

    def latent(self, x: Tensor, tensors: Tensors) -> Tensor:
        """The latent [..., r] of x [..., n]."""
        part = self.part(tensors)
        return project(x, part.factor_in, part.pivots)

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
        """What a TP rank with these of n input channels needs of factor_in, and what it adds to z.

        Args:
            indices: of the module, whole.
        """
        del indices, n
        return InputShare(range(0), slice(channels.start, channels.stop))
