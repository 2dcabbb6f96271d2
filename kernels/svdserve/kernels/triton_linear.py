"""The low-rank linear on GPUs: prepares factors for the Triton kernels, chooses and launches them.

A few rows are one launch (``triton_kernels.shrink_expand``), more are two. Which configuration
runs depends on the dtype and the number of rows only and is never tuned at run time, so a CUDA
graph captures what will run. The configurations were chosen by arithmetic and by what the compiler
reports (``python -m svdserve.kernels.aot``); ``svdserve bench --kernels`` measures them.

Importing this module imports Triton.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from svdserve.kernels import triton_kernels as kernels
from svdserve.kernels.operations import define
from svdserve.kernels.parts import Part, PreparedFactors, check_bias, check_input, other_channels

ALIGNMENT = 16  # Rows of every matrix begin at multiples of it; see triton_kernels.py.
PLAIN, GATHERED, IN_ORDER = (
    int(place.value) for place in (kernels.PLAIN, kernels.GATHERED, kernels.IN_ORDER)
)
_KERNELS = (kernels.shrink, kernels.expand, kernels.shrink_expand)
_ARGUMENTS = {name for kernel in _KERNELS for name in kernel.arg_names}
_MOST_BLOCKS = 8  # of rows, of a shrink whose sums are split
_COPIED = 1024  # columns of a row that a program of gather copies
_LARGEST = 2**31  # Offsets within one factor are 32 bits.


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


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of tl.dot: float32 is multiplied as such, not rounded to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU (TRITON_INTERPRET=1)."""
    return not isinstance(kernels.shrink, triton.runtime.JITFunction)


class TritonFactors(PreparedFactors):
    """See PreparedFactors; the factors padded and side by side."""

    inner: Tensor
    outer: Tensor
    channels: Tensor
    pivots: Tensor
    groups: Tensor
    counters: Tensor

    def __init__(self, parts: Sequence[Part], in_order: bool = False) -> None:
        """Copy the factors, except where one part has the layout of the kernels already.

        Args:
            parts: each with its own rank; shapes as in ``lowrank_linear``, checked by the caller.
            in_order: whether x arrives with its columns in ``order``; for one part only.

        Raises:
            ValueError: a factor of 2³¹ elements or more.
        """
        super().__init__()
        device = parts[0].factor_in.device
        self.ranks = [_padded(part.rank) for part in parts]
        self.outputs = [part.outputs for part in parts]
        # Several groups share the gathering kernel: a pair is then the case without pivots.
        gathers = len(parts) > 1 or parts[0].pivots is not None
        self.read = IN_ORDER if in_order else GATHERED if gathers else PLAIN
        inner = [_aligned(part.factor_in, rows=True) for part in parts]
        outer = [_aligned(part.factor_out, rows=True) for part in parts]
        if max(factor.numel() for factor in (*inner, *outer)) >= _LARGEST:
            raise ValueError(
                f"a factor of {_LARGEST:,} elements or more; the kernels count to that"
            )
        self.widths = widths = [factor.shape[1] for factor in inner]
        self.in_features = self.ranks[0] + widths[0] if in_order else parts[0].in_features
        chosen = [_chosen(part) for part in parts]
        buffers = {
            "inner": _flat(inner),
            "outer": _flat(outer),
            "channels": _indices([rest for _, rest in chosen], widths),
            "pivots": _indices([own for own, _ in chosen], self.ranks),
            "groups": _table(tuple(self.ranks), tuple(widths), tuple(self.outputs), device),
            "counters": torch.zeros(
                kernels.COUNTERS + _MOST_BLOCKS * sum(self.ranks) // ALIGNMENT,
                dtype=torch.int32,
                device=device,
            ),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.stored_bytes = sum(p.factor_in.nbytes + p.factor_out.nbytes for p in parts)

    @property
    def order(self) -> Tensor:
        """The channels in the order of shrink, pivots first (int64); -1 is a column of zeros."""
        return torch.cat([self.pivots, self.channels]).long()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., sum of m] of x [..., n]; bias [sum of m] or None."""
        return torch.ops.svdserve.lowrank_triton(  # type: ignore[no-any-return]
            x,
            self.inner,
            self.outer,
            self.channels,
            self.pivots,
            self.groups,
            self.counters,
            self.in_features,
            self.ranks,
            self.widths,
            self.outputs,
            self.read,
            bias,
        )


def _run(
    x: Tensor,
    inner: Tensor,
    outer: Tensor,
    channels: Tensor,
    pivots: Tensor,
    groups: Tensor,
    counters: Tensor,
    in_features: int,
    ranks: Sequence[int],
    widths: Sequence[int],
    outputs: Sequence[int],
    read: int,
    bias: Tensor | None,
) -> Tensor:
    check_input(x, in_features, inner)
    check_bias(bias, sum(outputs), x)
    rows = x.numel() // in_features
    padded = [_padded(size) for size in outputs]
    config = config_for(x.dtype, rows)
    y = x.new_empty(rows, sum(padded))
    if rows:
        whole = _aligned(x.reshape(rows, in_features))
        added = None if bias is None else _aligned_bias(bias, outputs)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            if config.shrink is None:
                latent = _latent(whole, inner, channels, pivots, ranks, widths, read)
                _expanded(latent, outer, added, ranks, padded, y)
            else:
                tensors = {
                    "x_ptr": whole,
                    "inner_ptr": inner,
                    "channels_ptr": channels,
                    "pivots_ptr": pivots,
                    "outer_ptr": outer,
                    "bias_ptr": y if added is None else added,
                    "y_ptr": y,
                    "groups_ptr": groups,
                    "counters_ptr": counters,
                    "arrivals_ptr": counters[kernels.COUNTERS :],
                }
                sizes = {
                    "rows": rows,
                    "x_blocks": whole.stride(0) // ALIGNMENT,
                    "y_blocks": y.shape[1] // ALIGNMENT,
                    "groups": len(ranks),
                    "has_bias": int(bias is not None),
                    "rest_block": ranks[0] // ALIGNMENT if read == IN_ORDER else 0,
                    "READ": read,
                }
                _launch(tensors, sizes, ranks, padded, config.shrink, config)
    if padded != list(outputs):
        blocks = torch.split(y, padded, dim=1)
        y = torch.cat([b[:, :size] for b, size in zip(blocks, outputs, strict=True)], dim=1)
    return y.reshape(*x.shape[:-1], sum(outputs))


def _latent(
    x: Tensor,
    inner: Tensor,
    channels: Tensor,
    pivots: Tensor,
    ranks: Sequence[int],
    widths: Sequence[int],
    read: int,
) -> Tensor:
    """z [rows, sum of ranks] of every part by the device's own products, after one gather."""
    rows = len(x)
    rest = x
    if read == GATHERED:
        z, rest = x.new_empty(rows, sum(ranks)), x.new_empty(rows, sum(widths))
        blocks = [size // ALIGNMENT for size in (x.stride(0), z.shape[1], rest.shape[1])]
        grid = rows, triton.cdiv(z.shape[1] + rest.shape[1], _COPIED)
        kernels.gather[grid](x, channels, pivots, z, rest, *blocks, BLOCK=_COPIED)
    elif read == IN_ORDER:
        # A copy, as z is added to: one row of x would count as contiguous, and be x itself.
        z, rest = x[:, : ranks[0]].clone(memory_format=torch.contiguous_format), x[:, ranks[0] :]
    else:
        z = x.new_empty(rows, ranks[0])
    factors = torch.split(inner, [rank * width for rank, width in zip(ranks, widths, strict=True)])
    parts = zip(
        torch.split(z, list(ranks), 1),
        torch.split(rest, list(widths), 1),
        factors,
        ranks,
        strict=True,
    )
    for own, other, factor, rank in parts:
        if factor.numel():
            # beta=0: whatever is in new memory, even NaN, counts for nothing.
            own.addmm_(other, factor.view(rank, -1).T, beta=0 if read == PLAIN else 1)
    return z


def _expanded(
    z: Tensor,
    outer: Tensor,
    bias: Tensor | None,
    ranks: Sequence[int],
    outputs: Sequence[int],
    y: Tensor,
) -> None:
    """y [rows, sum of outputs] of z by the device's own products."""
    factors = torch.split(outer, [size * rank for size, rank in zip(outputs, ranks, strict=True)])
    parts = zip(
        torch.split(z, list(ranks), 1),
        factors,
        torch.split(y, list(outputs), 1),
        outputs,
        strict=True,
    )
    for own, factor, found, size in parts:
        torch.mm(own, factor.view(size, -1).T, out=found)
    if bias is not None:
        y.add_(bias)


def _launch(
    tensors: dict[str, Tensor],
    sizes: dict[str, int],
    ranks: Sequence[int],
    outputs: Sequence[int],
    shrink: Tile,
    config: Config,
) -> None:
    """One launch or two; tensors and sizes by the names of the kernels' arguments."""
    expand, rows = config.expand or shrink, sizes["rows"]
    x = tensors["x_ptr"]
    z = sums = x.new_empty(rows, sum(ranks))
    if shrink.splits > 1:
        if triton.cdiv(rows, shrink.rows) > _MOST_BLOCKS:
            raise ValueError(f"{rows} rows; a split shrink takes {_MOST_BLOCKS} blocks of rows")
        sums = x.new_empty(shrink.splits * rows, sum(ranks), dtype=torch.float32)
    named = tensors | sizes | {"z_ptr": z, "sums_ptr": sums}
    named |= {"z_blocks": z.shape[1] // ALIGNMENT, "SPLITS": shrink.splits}
    shrinks = sum(triton.cdiv(rank, shrink.columns) for rank in ranks)
    expands = sum(triton.cdiv(size, expand.columns) for size in outputs)
    steps: list[tuple[Any, Tile, tuple[int, ...], dict[str, int]]]
    if config.launch == "one":
        programs = shrinks * shrink.splits + expands
        counts = {"shrink_tiles": shrinks, "tiles": programs}
        steps = [(kernels.shrink_expand, shrink, (programs,), counts)]
    else:
        steps = [
            (kernel, tile, (triton.cdiv(rows, tile.rows) * tiles, splits), {"tiles": tiles})
            for kernel, tile, tiles, splits in (
                (kernels.shrink, shrink, shrinks, shrink.splits),
                (kernels.expand, expand, expands, 1),
            )
        ]
    dtype, on_amd = x.dtype, torch.version.hip is not None
    for kernel, tile, programs, counts in steps:
        options = compile_options(tile, dtype, on_amd, early=config.launch == "early")
        given = named | counts | options | {"WIDEN": interpreted()}
        # The options of the compiler are no arguments of the kernel.
        foreign = set(given) & _ARGUMENTS - set(kernel.arg_names)
        kernel[programs](**{name: value for name, value in given.items() if name not in foreign})


def compile_options(
    tile: Tile, dtype: torch.dtype, on_amd: bool, early: bool = False
) -> dict[str, object]:
    """Compile-time arguments and options of a kernel with such a tile."""
    return {
        "PRECISION": precision(dtype),
        "EARLY": early,
        "LINES": tile.lines,
        "BT": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "num_warps": tile.warps,
        # AMD's compiler keeps loads under way in registers, and two stages are what it plans for.
        "num_stages": min(tile.stages, 2) if on_amd else tile.stages,
        "enable_fp_fusion": True,  # Triton's default changes between versions
        **({"launch_pdl": True} if early else {}),
    }


def _fake(
    x: Tensor,
    inner: Tensor,
    outer: Tensor,
    channels: Tensor,
    pivots: Tensor,
    groups: Tensor,
    counters: Tensor,
    in_features: int,
    ranks: Sequence[int],
    widths: Sequence[int],
    outputs: Sequence[int],
    read: int,
    bias: Tensor | None,
) -> Tensor:
    del inner, outer, channels, pivots, groups, counters, in_features, ranks, widths, read, bias
    return x.new_empty(*x.shape[:-1], sum(outputs))


define(
    "lowrank_triton(Tensor x, Tensor inner, Tensor outer, Tensor channels, Tensor pivots, "
    "Tensor groups, Tensor counters, int in_features, int[] ranks, int[] widths, int[] outputs, "
    "int read, Tensor? bias) -> Tensor",
    _run,
    _fake,
)


def _padded(size: int) -> int:
    return triton.cdiv(size, ALIGNMENT) * ALIGNMENT  # type: ignore[no-any-return]


def _aligned(matrix: Tensor, rows: bool = False) -> Tensor:
    """The matrix, zero padded to whole blocks of columns (and rows); no copy where it fits."""
    height, width = matrix.shape
    missing = _padded(width) - width, (_padded(height) - height) if rows else 0
    if any(missing):
        return pad(matrix, (0, missing[0], 0, missing[1]))
    dense = matrix.is_contiguous() if rows else matrix.stride(1) == 1
    fits = matrix.stride(0) % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0
    return matrix if dense and fits else matrix.clone(memory_format=torch.contiguous_format)


def _aligned_bias(bias: Tensor, outputs: Sequence[int]) -> Tensor:
    """The bias of all groups, each group's padded to whole blocks; no copy where it fits."""
    if all(size % ALIGNMENT == 0 for size in outputs):
        fits = bias.data_ptr() % ALIGNMENT == 0 and bias.is_contiguous()
        return bias if fits else bias.clone(memory_format=torch.contiguous_format)
    own = torch.split(bias, list(outputs))
    return torch.cat([pad(block, (0, -len(block) % ALIGNMENT)) for block in own])


def _chosen(part: Part) -> tuple[Tensor, Tensor]:
    """The pivots of a part and its other channels; all channels and no pivots for a pair."""
    if part.pivots is None:
        everything = torch.arange(part.in_features, device=part.factor_in.device)
        return everything[:0], everything
    return part.pivots, other_channels(part.pivots, part.in_features)


def _indices(channels: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The channels of every part as int32, each part's padded to its size."""
    padded = [
        pad(own.to(torch.int32), (0, size - len(own)), value=-1)
        for own, size in zip(channels, sizes, strict=True)
    ]
    return _flat(padded)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


@lru_cache(maxsize=4096)
def _table(
    ranks: tuple[int, ...], widths: tuple[int, ...], outputs: tuple[int, ...], device: torch.device
) -> Tensor:
    """The table of groups; kept, as copying it to the device cannot be a part of a CUDA graph."""
    padded = [_padded(size) for size in outputs]
    columns = (
        ranks,
        widths,
        padded,
        _starts(rank * width for rank, width in zip(ranks, widths, strict=True)),
        _starts(size * rank for size, rank in zip(padded, ranks, strict=True)),
        _starts(widths),
        _starts(ranks),
        _starts(padded),
    )
    table = torch.tensor(columns).T.contiguous() // ALIGNMENT
    return table.to(device=device, dtype=torch.int32)


def _starts(sizes: Iterator[int] | Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))[:-1]
