"""The arguments of a low-rank linear and the checks that every implementation shares."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

# The activation of a gated MLP, act(gate) * up; its first layer's outputs are gate, then up.
Activation = Literal["silu", "gelu_tanh"]


class Int8Matrix(NamedTuple):
    """A matrix [m, n] as integers in -127..127 (int8) times a float32 scale for each row [m]."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


Matrix = Tensor | Int8Matrix


class Part(NamedTuple):
    """The factors of one low-rank linear W [m, n]; reference.py defines them."""

    factor_in: Tensor
    factor_out: Tensor
    pivots: Tensor | None = None

    @property
    def columns(self) -> tuple[int, int]:
        """The numbers of columns of factor_in and factor_out."""
        return self.factor_in.shape[1], self.factor_out.shape[1]

    @property
    def rank(self) -> int:
        return self.factor_out.shape[1]

    @property
    def outputs(self) -> int:
        return self.factor_out.shape[0]

    @property
    def in_features(self) -> int:
        return self.factor_in.shape[1] + (0 if self.pivots is None else len(self.pivots))


class Int8Part(NamedTuple):
    """The int8 factors of one low-rank linear W [m, n]; reference.int8_linear defines it."""

    factor_in: Int8Matrix
    factor_out: Int8Matrix
    pivots: Tensor | None = None

    @property
    def columns(self) -> tuple[int, int]:
        """The numbers of columns of factor_in and factor_out."""
        return self.factor_in.shape[1], self.factor_out.shape[1]

    @property
    def outputs(self) -> int:
        return self.factor_out.shape[0]

    @property
    def in_features(self) -> int:
        return self.factor_in.shape[1] + (0 if self.pivots is None else len(self.pivots))


class WholePart(NamedTuple):
    """A weight W [m, n] that is not factored."""

    weight: Matrix

    @property
    def columns(self) -> tuple[int, int]:
        """0, as there is no factor_in, and the number of columns of W."""
        return 0, self.weight.shape[1]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


AnyPart = Part | Int8Part | WholePart


class PreparedFactors(nn.Module):
    """One or several linears of the same x, with weights prepared for one implementation.

    Called with x [..., n] and a bias [sum of m] or None, it returns y [..., sum of m], the outputs
    of the parts one after the other. With an activation it returns act(gate) * up
    [..., sum of m / 2].

    Attributes:
        stored_bytes: of the factors before they were prepared.
    """

    stored_bytes: int


def other_channels(pivots: Tensor, in_features: int) -> Tensor:
    """The channels [n - r] (int64, ascending) that are not pivots."""
    taken = torch.zeros(in_features, dtype=torch.bool, device=pivots.device)
    taken[pivots.long()] = True
    if pivots.device.type == "cpu":
        return taken.logical_not().nonzero().squeeze(1)
    # The shape of a sort is known beforehand, so it needs no wait for the device and does not break
    # a CUDA graph.
    return taken.to(torch.int8).argsort(stable=True)[: in_features - len(pivots)]


def check_factors(part: Part) -> None:
    """Check shapes, dtypes and devices of a part; ``check_pivots`` checks the values of pivots.

    Raises:
        ValueError: they do not fit together.
    """
    inner, outer, _ = part
    _check_shapes(part)
    if not inner.dtype.is_floating_point or inner.dtype != outer.dtype:
        raise ValueError(
            f"factors are {inner.dtype} and {outer.dtype}; expected one floating point dtype"
        )
    _check_together(part)


def check_pivots(pivots: Tensor, in_features: int) -> None:
    """Check that pivots are distinct channels.

    This waits for the device, so it is done once for a layer, not in every call.

    Raises:
        ValueError: pivots repeat or are out of range.
    """
    ascending = pivots.sort().values
    inside = int(ascending[0]) >= 0 and int(ascending[-1]) < in_features
    if not inside or bool((ascending.diff() == 0).any()):
        raise ValueError(f"pivots must be distinct within 0 .. {in_features - 1}")


def check_int8(part: Int8Part | WholePart) -> None:
    """Check shapes, dtypes and devices of int8 factors, or of a weight that is not factored.

    Raises:
        ValueError: they do not fit together.
    """
    if isinstance(part, WholePart):
        _check_matrix("the weight", part.weight)
        return
    named = (("factor_in", part.factor_in), ("factor_out", part.factor_out))
    for name, matrix in named:
        if not isinstance(matrix, Int8Matrix):
            raise ValueError(f"{name} is {matrix.dtype}; expected int8 factors with their scales")
        _check_matrix(name, matrix)
    _check_shapes(part)
    _check_together(part)


def _check_matrix(name: str, matrix: Matrix) -> None:
    if len(matrix.shape) != 2:
        raise ValueError(f"{name} is {list(matrix.shape)}; expected a matrix [m, n]")
    if not isinstance(matrix, Int8Matrix):
        if not matrix.dtype.is_floating_point:
            raise ValueError(
                f"{name} is {matrix.dtype}; expected floating point, or int8 and scales"
            )
        return
    values, scale = matrix
    if values.dtype != torch.int8 or scale.dtype != torch.float32:
        raise ValueError(f"{name} is {values.dtype} and {scale.dtype}; expected int8 and float32")
    if scale.shape != values.shape[:1] or scale.device != values.device:
        raise ValueError(
            f"the scales of {name} are {list(scale.shape)} on {scale.device}; expected "
            f"{list(values.shape[:1])} on {values.device}"
        )


def check_input(x: Tensor, in_features: int, like: Tensor) -> None:
    """Check that x [..., n] has the channels, dtype and device of the factors.

    Raises:
        ValueError: it does not.
    """
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x is {list(x.shape)}; the factors expect [..., {in_features}]")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}; the factors are {like.dtype} on {like.device}"
        )


def check_bias(bias: Tensor | None, outputs: int, x: Tensor) -> None:
    """Check that bias is None, or [m] with the dtype and device of x.

    Raises:
        ValueError: it is not.
    """
    if bias is None:
        return
    if tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias is {list(bias.shape)}; expected [{outputs}]")
    if bias.dtype != x.dtype or bias.device != x.device:
        raise ValueError(f"bias is {bias.dtype} on {bias.device}; x is {x.dtype} on {x.device}")


def same_inputs(parts: Sequence[AnyPart]) -> None:
    """Check that all parts can read the same x.

    Raises:
        ValueError: they differ in channels, dtype or device, or there is no part.
    """
    found = {(p.in_features, last(p).dtype, last(p).device) for p in parts}
    if len(found) != 1:
        named = [f"{n} channels, {dtype} on {device}" for n, dtype, device in found]
        raise ValueError(f"parts of one layer must read the same x, found {named}")


def last(part: AnyPart) -> Matrix:
    """The matrix that produces the outputs: factor_out, or the whole weight."""
    return part.weight if isinstance(part, WholePart) else part.factor_out


_EXPECTED = "expected [r, n] and [m, r], or with pivots [r, n - r], [m, r] and [r]; r at least 1"


def _check_together(part: Part | Int8Part) -> None:
    pivots = part.pivots
    if pivots is not None and pivots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"pivots are {pivots.dtype}; expected int32 or int64")
    devices = {tensor.device for tensor in part if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"factors and pivots are on {sorted(map(str, devices))}; expected one")


def _check_shapes(part: Part | Int8Part) -> None:
    inner, outer, pivots = part
    matrices = len(inner.shape) == len(outer.shape) == 2
    rank = outer.shape[1] if matrices else 0
    fits = rank > 0 and inner.shape[0] == rank
    if not fits or (pivots is not None and tuple(pivots.shape) != (rank,)):
        given = [list(tensor.shape) for tensor in part if tensor is not None]
        raise ValueError(f"factor_in, factor_out and pivots are {given}; {_EXPECTED}")
