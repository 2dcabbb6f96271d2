"""How the Triton kernels divide their work, by dtype and number of rows of x; imports no Triton.

The configurations were chosen by arithmetic and by what the compiler reports
(``python -m svdserve.kernels.triton.aot``); ``svdserve bench --kernels`` measures them.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch


@dataclass(frozen=True)
class Tile:
    """How a kernel divides its work: a program computes [rows, columns] in steps of ``depth``.

    Attributes:
        splits: how many programs share the sum of one tile; more than one in shrink only.
        lines: how many pieces of 128 bytes of every row of the factor are asked for while z is
            not complete yet.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    splits: int = 1
    lines: int = 0


@dataclass(frozen=True)
class Config:
    """How up to ``rows`` rows of x are multiplied (None: any number).

    Attributes:
        shrink, expand: their tiles; None for the device's own products, after one gather.
        launch: both in one; in two; or in two of which the second starts early (sm_90 and later).
    """

    rows: int | None
    shrink: Tile | None = None
    expand: Tile | None = None
    launch: Literal["one", "two", "early"] = "two"


def single(rows: int, tile: Tile) -> Config:
    """One launch, whose two halves have the same tile."""
    return Config(rows, tile, replace(tile, splits=1), "one")


def double(rows: int | None, tile: Tile) -> Config:
    """Two launches with the same tile."""
    return Config(rows, tile, tile)


# Decoding is bound by the bytes of the weights: small tiles keep all processors busy, deep stages
# keep enough loads under way. Prefill is bound by arithmetic: tiles that tensor cores like.
_HALF = (
    single(16, Tile(16, 16, 128, warps=2, stages=5)),
    single(64, Tile(64, 32, 64, warps=4, stages=6)),
    double(None, Tile(128, 128, 64, warps=8, stages=3)),
)
_SINGLE = (
    single(16, Tile(16, 32, 32, warps=4, stages=3)),
    double(None, Tile(64, 32, 32, warps=4, stages=3)),
)
CONFIGS: dict[torch.dtype, tuple[Config, ...]] = {
    torch.bfloat16: _HALF,
    torch.float16: _HALF,
    torch.float32: _SINGLE,
}


def config_for(dtype: torch.dtype, rows: int) -> Config:
    """The configuration for so many rows of x."""
    return next(c for c in CONFIGS[dtype] if c.rows is None or rows <= c.rows)
