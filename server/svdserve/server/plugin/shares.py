"""What one TP rank reads of a layer's tensors: its rows and its input channels, and no more.

It reads the columns of its channels from factor_in, and its rows from factor_out. It reads indices
whole, because they say where each channel stands. Factors that cannot be cut as they are stored are
decoded first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from svdserve.compression.format.codecs import FLOAT, Codec
from svdserve.compression.format.layouts import INTERPOLATIVE, PAIR, InputShare
from svdserve.compression.format.reader import WEIGHT, Checkpoint
from svdserve.compression.format.stored import StoredFactors
from svdserve.server.plugin.layer_parts import LayerPart

Read = Callable[[str, slice, slice], Tensor]
"""Reads rows and columns of the tensor with the given suffix; a vector has rows only."""


@dataclass(frozen=True)
class Matrix:
    """An encoded matrix [m, n]; ``tensors`` has its tensors by the suffixes of the codec."""

    codec: Codec
    tensors: dict[str, Tensor]

    @property
    def shape(self) -> torch.Size:
        return self.tensors[""].shape

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The matrix [m, n] in ``dtype``; if the codec is plain, in the dtype that is stored."""
        return self.tensors[""] if self.codec.plain else self.codec.decode(self.tensors, dtype)


@dataclass(frozen=True)
class LowRankShare:
    """One TP rank's share of a factored part.

    Attributes:
        inner: [r, n'], the columns of factor_in for those of the TP rank's channels that are
            multiplied.
        outer: [m', r], the TP rank's rows of factor_out.
        inputs: how the latent comes from the TP rank's input channels.
    """

    inner: Matrix
    outer: Matrix
    inputs: InputShare


def read_factors(
    checkpoint: Checkpoint, part: LayerPart, rows: Sequence[Tensor], channels: range
) -> LowRankShare:
    """This TP rank's share of a factored part, with the given rows of each linear.

    Raises:
        UserError: a value is not finite, or the codec never writes it.
    """
    assert part.spec is not None
    (name,), spec = part.names, part.spec
    layout, codec = spec.layout_and_codec()

    stored = partial(checkpoint.block, name)
    read: Read = stored
    indices = {suffix: stored(suffix) for suffix in layout.indices}
    if layout.decoded_when_served or codec.axes is None:
        tensors = {suffix: stored(suffix) for suffix in spec.tensors()}
        whole = StoredFactors(layout, codec, tensors).decoded(torch.float32)
        plain = layout.part(whole)
        layout, codec = (PAIR if plain.pivots is None else INTERPOLATIVE), FLOAT
        indices = {} if plain.pivots is None else {"pivots": plain.pivots}
        decoded = {"factor_in": plain.factor_in, "factor_out": plain.factor_out}

        def read(suffix: str, rows: slice, columns: slice) -> Tensor:
            return decoded[suffix][rows, columns]

    inputs = layout.input_share(indices, spec.in_features, channels)
    starts = [0, *accumulate(spec.out_features)]
    blocks = list(zip(rows, starts, strict=False))
    inner, outer = {}, {}
    for suffix, axes in (codec.axes or {}).items():
        columns = inputs.columns if 1 in axes else slice(None)
        inner[suffix] = read(f"factor_in{suffix}", slice(None), columns)
        outer[suffix] = torch.cat(
            [_rows(read, f"factor_out{suffix}", mine, start) for mine, start in blocks]
        )
        if inputs.latent is not None:
            inner[suffix] = inner[suffix][inputs.latent]
            outer[suffix] = outer[suffix][:, inputs.latent] if 1 in axes else outer[suffix]
    return LowRankShare(Matrix(codec, inner), Matrix(codec, outer), inputs)


def read_whole(
    checkpoint: Checkpoint, part: LayerPart, rows: Sequence[Tensor], channels: range
) -> Matrix:
    """This TP rank's share of the weight of a part that is stored whole."""
    columns = slice(channels.start, channels.stop)
    codec, mine = part.codec, list(zip(part.names, rows, strict=True))
    if codec.axes is None:
        weights = [checkpoint.weight(name, torch.float32)[r, columns] for name, r in mine]
        return Matrix(FLOAT, {"": torch.cat(weights)})
    tensors = {}
    for suffix, axes in codec.axes.items():
        cut = columns if 1 in axes else slice(None)
        blocks = [
            _rows(partial(checkpoint.block, name), f"{WEIGHT}{suffix}", r, columns=cut)
            for name, r in mine
        ]
        tensors[suffix] = torch.cat(blocks)
    return Matrix(codec, tensors)


def _rows(
    read: Read, suffix: str, rows: Tensor, start: int = 0, columns: slice = slice(None)
) -> Tensor:
    """Rows of a stored tensor, counted from ``start``; only the span that holds them is read."""
    low, high = int(rows.min()), int(rows.max()) + 1
    block = read(suffix, slice(start + low, start + high), columns)
    ascending = len(rows) == high - low and bool((rows.diff() == 1).all())
    return block if ascending else block[rows - low]
