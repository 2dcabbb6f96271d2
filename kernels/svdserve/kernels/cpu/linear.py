"""The low-rank linear as one C++ operation: this module packs the weights and calls it."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from svdserve.kernels.cpu.build import unsupported
from svdserve.kernels.parts import Activation, Int8Matrix, Matrix, PreparedFactors

_WORD = 32  # channels in one word of the mask
_LANES = 16  # rows of gate, then of up, in the packed C of a gated layer
_PANEL = 32  # rows of a packed panel, for which scales are padded
_ACTIVATIONS: tuple[Activation | None, ...] = (None, "silu", "gelu_tanh")  # activation.h


class PackedFactors(PreparedFactors):
    """y = C (x[pivots] + Z x[rest]) + b, or y = U (V x) + b, or y = W x + b, with packed weights.

    With an activation, y = act(gate) * up, where gate and up are the two halves of that y. Int8
    weights are multiplied with activations that are rounded to int8 (``reference.rounded``).

    Attributes:
        stored_bytes: of the weights before packing, which pads rows to multiples of 16.
    """

    packed_in: Tensor | None
    scale_in: Tensor | None
    packed_out: Tensor
    scale_out: Tensor | None
    mask: Tensor

    def __init__(
        self,
        factor_in: Matrix | None,
        factor_out: Matrix,
        pivots: Tensor | None = None,
        *,
        activation: Activation | None = None,
        amx: bool | None = None,
    ) -> None:
        """Copy the weights; the caller may free its own.

        Args:
            factor_in: [r, n], or [r, n - r] with pivots; None for a weight that is not factored.
            factor_out: [m, r], or the whole weight [m, n]. Both are bfloat16, or both int8.
            pivots: [r] strictly ascending channels of x, or None for the pair layout.
            activation: None, or the activation of a gated MLP if the rows of factor_out are gate
                and up, m / 2 of each.
            amx: whether to multiply with AMX; None uses it if the processor has it.

        Raises:
            ValueError: shapes, dtypes or pivots do not fit together.
            RuntimeError: the kernel cannot run here; ``unsupported()`` says why.
        """
        super().__init__()
        rows, self.rank = factor_out.shape
        self.outputs = rows // 2 if activation else rows
        self.pivots = 0 if pivots is None else len(pivots)
        columns = self.rank if factor_in is None else factor_in.shape[1]
        channels = self.pivots + columns
        _check(factor_in, factor_out, pivots, channels)
        if reason := unsupported():
            raise RuntimeError(f"the fused kernel cannot run: {reason}")
        self.amx: bool = torch.ops.svdserve.has_amx() if amx is None else amx
        self._pack("in", factor_in, None)
        self._pack("out", factor_out, activation)
        self.register_buffer("mask", _mask(pivots, channels), persistent=False)
        self.stored_bytes = factor_out.nbytes + (0 if factor_in is None else factor_in.nbytes)
        # A small layer costs a few microseconds; looking all this up on every call would double it.
        self._activation = _ACTIVATIONS.index(activation)
        self._operands: tuple[object, ...] = (
            *(self.packed_in, self.packed_out),
            *(self.mask, self.pivots, self.rank, self.outputs),
        )
        self._operation = torch.ops.svdserve.lowrank.default
        if isinstance(factor_out, Int8Matrix):
            self._operation = torch.ops.svdserve.lowrank_int8.default
            self._operands = (
                *(self.packed_in, self.scale_in, self.packed_out, self.scale_out),
                *(self.mask, self.pivots, self.rank, self.outputs),
            )

    def _pack(self, name: str, matrix: Matrix | None, activation: Activation | None) -> None:
        values, scale = matrix if isinstance(matrix, Int8Matrix) else (matrix, None)
        if values is not None:
            values = _interleaved(values) if activation else values.contiguous()
            operations = torch.ops.svdserve
            values = (operations.pack if scale is None else operations.pack_int8)(values)
        if scale is not None:
            scale = _interleaved(scale[:, None]).squeeze(1) if activation else scale
            scale = pad(scale, (0, -len(scale) % _PANEL)).contiguous()
        self.register_buffer(f"packed_{name}", values, persistent=False)
        self.register_buffer(f"scale_{name}", scale, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., m] of x [..., n], bfloat16 on CPU; bias [m] or None.

        With an activation, y [..., m / 2] and no bias.
        """
        return self._operation(  # type: ignore[no-any-return]
            x, *self._operands, bias, self._activation, self.amx
        )


def _check(
    factor_in: Matrix | None, factor_out: Matrix, pivots: Tensor | None, channels: int
) -> None:
    rank, given = factor_out.shape[1], [m for m in (factor_in, factor_out) if m is not None]
    whole = factor_in is None and pivots is None
    fits = whole or (factor_in is not None and factor_in.shape[0] == rank)
    if not fits or rank == 0 or (pivots is not None and len(pivots) != rank):
        shapes = [list(matrix.shape) for matrix in given]
        shapes += [] if pivots is None else [list(pivots.shape)]
        raise ValueError(
            f"factor_in, factor_out and pivots are {shapes}; expected [r, n], [m, r], or with "
            "pivots [r, n - r], [m, r], [r], or a whole weight [m, n] alone"
        )
    dtypes = {matrix.dtype for matrix in given}
    devices = {matrix.device.type for matrix in given}
    if dtypes not in ({torch.bfloat16}, {torch.int8}) or devices != {"cpu"}:
        found = ", ".join(f"{matrix.dtype} on {matrix.device}" for matrix in given)
        raise ValueError(f"weights are {found}; expected all bfloat16 or all int8, on cpu")
    if pivots is not None and not (
        int(pivots[0]) >= 0 and int(pivots[-1]) < channels and bool((pivots.diff() > 0).all())
    ):
        raise ValueError(f"pivots must ascend strictly within 0 .. {channels - 1}")


def _interleaved(rows: Tensor) -> Tensor:
    """Gate and up [m / 2, r] with 16 rows of each in turn; the last rows are padded with 0."""
    halves = rows.chunk(2)
    padding = -len(halves[0]) % _LANES
    blocks = (-1, _LANES, rows.shape[1])
    padded = [pad(half, (0, 0, 0, padding)).reshape(blocks) for half in halves]
    return torch.stack(padded, dim=1).flatten(0, 2)


def _mask(pivots: Tensor | None, channels: int) -> Tensor:
    """One bit for each channel, set for pivots; 32 in an int32, the lowest bit first."""
    bits = torch.zeros(-(-channels // _WORD), _WORD, dtype=torch.int64)
    if pivots is not None:
        bits.view(-1)[pivots.long()] = 1
    words = (bits << torch.arange(_WORD)).sum(dim=1)
    return words.to(torch.int32)  # wraps: only the bits count
