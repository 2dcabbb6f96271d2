"""What one TP rank reads of a layer's tensors: its rows and its input channels, and no more.

Of factor_in that is the columns of its channels, of factor_out its rows. Pivots are read whole, as
they say where the channels stand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from svdserve.compression.format.checkpoint import Checkpoint
from svdserve.compression.format.factors import Factors, other_channels
from svdserve.server.plugin.quantization import Part


@dataclass(frozen=True)
class Places:
    """Where a rank's input channels stand in the interpolative layout.

    Attributes:
        slots: of its pivots among all pivots, that is in z.
        columns: of its other channels among all others, that is in Z.
        order: its channels, counted from its first one: pivots, then the others; int64.
    """

    slots: range
    columns: range
    order: Tensor

    @classmethod
    def of(cls, pivots: Tensor, in_features: int, channels: range) -> "Places":
        pivots = pivots.long().sort().values
        rest = other_channels(pivots, in_features)
        slots, columns = _within(pivots, channels), _within(rest, channels)
        mine = pivots[slots.start : slots.stop], rest[columns.start : columns.stop]
        return cls(slots, columns, torch.cat(mine) - channels.start)


def read_factors(
    checkpoint: Checkpoint, part: Part, rows: Sequence[Tensor], channels: range
) -> tuple[Factors, Places]:
    """This rank's share of a factored part, and where its input channels stand.

    ``factor_out`` has the given rows of each linear, ``factor_in`` the columns of the rank's
    input channels; pivots are all there, ascending.

    Raises:
        UserError: a value is not finite, or a scale not positive.
    """
    assert part.spec is not None
    (name,), spec = part.names, part.spec
    pivots: Tensor | None = None
    order: Tensor | slice = slice(None)
    places = Places(range(0), channels, torch.arange(len(channels)))
    if spec.layout == "interpolative":
        pivots = checkpoint.block(name, "pivots")
        places = Places.of(pivots, spec.in_features, channels)
        if not bool((pivots.diff() > 0).all()):
            # Sorted, so that each rank's are contiguous in z.
            pivots, order = pivots.sort()
    starts = [0, *accumulate(spec.out_features)]

    def outer(suffix: str) -> Tensor:
        blocks = zip(rows, starts, strict=False)
        return torch.cat([_read(checkpoint, name, suffix, r, start) for r, start in blocks])

    columns = slice(places.columns.start, places.columns.stop)
    factors = Factors(
        factor_in=checkpoint.block(name, "factor_in", columns=columns)[order],
        factor_out=outer("factor_out")[:, order],
        pivots=pivots,
    )
    if spec.weights == "int8":
        factors = replace(
            factors,
            factor_in_scale=checkpoint.block(name, "factor_in_scale")[order],
            factor_out_scale=outer("factor_out_scale"),
        )
    return factors, places


def read_dense(
    checkpoint: Checkpoint, part: Part, rows: Sequence[Tensor], channels: range
) -> tuple[Tensor, Tensor | None]:
    """This rank's share of a dense part's weight, and the scales of its rows where int8."""
    columns = slice(channels.start, channels.stop)
    weight, *scale = (
        torch.cat(
            [
                _read(checkpoint, name, suffix, r, columns=columns)
                for name, r in zip(part.names, rows, strict=True)
            ]
        )
        for suffix in part.suffixes
    )
    return weight, scale[0] if scale else None


def _read(
    checkpoint: Checkpoint,
    module: str,
    suffix: str,
    rows: Tensor,
    start: int = 0,
    columns: slice = slice(None),
) -> Tensor:
    """Rows of a stored tensor, counted from ``start``; reads the span that holds them."""
    low, high = int(rows.min()), int(rows.max()) + 1
    block = checkpoint.block(module, suffix, slice(start + low, start + high), columns)
    ascending = len(rows) == high - low and bool((rows.diff() == 1).all())
    return block if ascending else block[rows - low]


def _within(ascending: Tensor, channels: range) -> range:
    """The positions in an ascending list of channels that fall into ``channels``."""
    bounds = torch.tensor([channels.start, channels.stop])
    start, stop = torch.searchsorted(ascending, bounds).tolist()
    return range(start, stop)
