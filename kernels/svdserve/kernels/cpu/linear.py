"""The low-rank linear as one C++ operation: this module packs the factors and calls it."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from svdserve.kernels.cpu.build import unsupported
from svdserve.kernels.parts import Activation, PreparedFactors

_WORD = 32  # channels in one word of the mask
_LANES = 16  # rows of gate, then of up, in the packed C of a gated layer
_ACTIVATIONS: tuple[Activation | None, ...] = (None, "silu", "gelu_tanh")  # activation.h


class PackedFactors(PreparedFactors):
    """y = C (x[pivots] + Z x[rest]) + b, or y = U (V x) + b, with factors packed for the operation.

    With an activation, y = act(gate) * up, where gate and up are the two halves of that y.

    Attributes:
        stored_bytes: of the factors before packing, which pads rows to multiples of 16.
    """

    packed_in: Tensor
    packed_out: Tensor
    mask: Tensor

    def __init__(
        self,
        factor_in: Tensor,
        factor_out: Tensor,
        pivots: Tensor | None = None,
        *,
        activation: Activation | None = None,
        amx: bool | None = None,
    ) -> None:
        """Copy the factors; the caller may free its own.

        Args:
            factor_in: [r, n], or [r, n - r] with pivots; bfloat16 on CPU.
            factor_out: [m, r]; bfloat16 on CPU.
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
        self.channels = self.pivots + factor_in.shape[1]
        _check(factor_in, factor_out, pivots, self.channels)
        if reason := unsupported():
            raise RuntimeError(f"the fused kernel cannot run: {reason}")
        self.amx: bool = torch.ops.svdserve.has_amx() if amx is None else amx
        pack = torch.ops.svdserve.pack
        self.register_buffer("packed_in", pack(factor_in), persistent=False)
        outer = _interleaved(factor_out) if activation else factor_out
        self.register_buffer("packed_out", pack(outer), persistent=False)
        self.register_buffer("mask", _mask(pivots, self.channels), persistent=False)
        self.stored_bytes = factor_in.nbytes + factor_out.nbytes
        # A small layer costs a few microseconds; looking all this up on every call would double it.
        self._activation = _ACTIVATIONS.index(activation)
        self._operation = torch.ops.svdserve.lowrank.default
        self._operands = (
            *(self.packed_in, self.packed_out, self.mask),
            *(self.pivots, self.rank, self.outputs),
        )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., m] of x [..., n], bfloat16 on CPU; bias [m] or None.

        With an activation, y [..., m / 2] and no bias.
        """
        return self._operation(  # type: ignore[no-any-return]
            x, *self._operands, bias, self._activation, self.amx
        )


def _check(factor_in: Tensor, factor_out: Tensor, pivots: Tensor | None, channels: int) -> None:
    rank = factor_out.shape[1]
    if factor_in.shape[0] != rank or rank == 0 or (pivots is not None and len(pivots) != rank):
        given = [list(f.shape) for f in (factor_in, factor_out, pivots) if f is not None]
        raise ValueError(
            f"factor_in, factor_out and pivots are {given}; expected [r, n], [m, r], or with "
            "pivots [r, n - r], [m, r], [r]"
        )
    for factor in (factor_in, factor_out):
        if factor.dtype != torch.bfloat16 or factor.device.type != "cpu":
            raise ValueError(f"a factor is {factor.dtype} on {factor.device}; expected bfloat16")
    if pivots is not None and not (
        int(pivots[0]) >= 0 and int(pivots[-1]) < channels and bool((pivots.diff() > 0).all())
    ):
        raise ValueError(f"pivots must ascend strictly within 0 .. {channels - 1}")


def _interleaved(factor_out: Tensor) -> Tensor:
    """Gate and up [m / 2, r] with 16 rows of each in turn; the last rows are padded with 0."""
    halves = factor_out.chunk(2)
    padding = -len(halves[0]) % _LANES
    blocks = (-1, _LANES, factor_out.shape[1])
    padded = [pad(half, (0, 0, 0, padding)).reshape(blocks) for half in halves]
    return torch.stack(padded, dim=1).flatten(0, 2)


def _mask(pivots: Tensor | None, channels: int) -> Tensor:
    """One bit for each channel, set for pivots; 32 in an int32, the lowest bit first."""
    bits = torch.zeros(-(-channels // _WORD), _WORD, dtype=torch.int64)
    if pivots is not None:
        bits.view(-1)[pivots.long()] = 1
    words = (bits << torch.arange(_WORD)).sum(dim=1)
    return words.to(torch.int32)  # wraps: only the bits count
