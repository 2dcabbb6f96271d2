"""The low-rank linear on GPUs: prepares factors for the Triton kernels, chooses and launches them.

A few rows are one launch (``triton_kernels.shrink_expand``), more are two. Which configuration
runs depends on the dtype and the number of rows only and is never tuned at run time, so a CUDA
graph captures what will run. The configurations were chosen by arithmetic and by what the compiler
reports (``python -m svdserve.kernels.aot``); ``svdserve bench --kernels`` measures them.

Importing this module imports Triton.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from svdserve.kernels import triton_kernels as kernels
from svdserve.kernels.operations import define
from svdserve.kernels.parts import Part, PreparedFactors, check_bias, check_input, other_channels

ALIGNMENT = 16  # Rows of every matrix begin at multiples of it; see triton_kernels.py.
TENSORS = tuple(name for name in kernels.shrink_expand.arg_names if name.endswith("_ptr"))
_LARGEST = 2**31  # Offsets within one factor are 32 bits.


@dataclass(frozen=True)
class Config:
    """How the kernels run for up to ``rows`` rows of x (None: for any number)."""

    rows: int | None
    block_rows: int
    block_columns: int
    block_depth: int
    warps: int
    stages: int
    single_launch: bool = False


# Decoding is bound by the bytes of the weights: small tiles keep all processors busy, deep stages
# keep enough loads under way. Prefill is bound by arithmetic: tiles that tensor cores like.
_HALF = (
    Config(16, 16, 16, 128, warps=2, stages=5, single_launch=True),
    Config(64, 64, 32, 64, warps=4, stages=6, single_launch=True),
    Config(None, 128, 128, 64, warps=8, stages=3),
)
_SINGLE = (
    Config(16, 16, 32, 32, warps=4, stages=3, single_launch=True),
    Config(None, 64, 64, 32, warps=4, stages=3),
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

    def __init__(self, parts: Sequence[Part]) -> None:
        """Copy the factors, except where one part has the layout of the kernels already.

        Args:
            parts: each with its own rank; shapes as in ``lowrank_linear``, checked by the caller.

        Raises:
            ValueError: a factor of 2³¹ elements or more.
        """
        super().__init__()
        device = parts[0].factor_in.device
        self.in_features = parts[0].in_features
        self.ranks = [_padded(part.rank) for part in parts]
        self.outputs = [part.outputs for part in parts]
        # Several groups share the gathering kernel: a pair is then the case without pivots.
        self.gather = len(parts) > 1 or parts[0].pivots is not None
        inner = [_aligned(part.factor_in, rows=True) for part in parts]
        outer = [_aligned(part.factor_out, rows=True) for part in parts]
        if max(factor.numel() for factor in (*inner, *outer)) >= _LARGEST:
            raise ValueError(
                f"a factor of {_LARGEST:,} elements or more; the kernels count to that"
            )
        widths = [factor.shape[1] for factor in inner]
        chosen = [_chosen(part) for part in parts]
        buffers = {
            "inner": _flat(inner),
            "outer": _flat(outer),
            "channels": _indices([rest for _, rest in chosen], widths),
            "pivots": _indices([own for own, _ in chosen], self.ranks),
            "groups": _table(tuple(self.ranks), tuple(widths), tuple(self.outputs), device),
            "counters": torch.zeros(kernels.COUNTERS, dtype=torch.int32, device=device),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.stored_bytes = sum(p.factor_in.nbytes + p.factor_out.nbytes for p in parts)

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
            self.outputs,
            self.gather,
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
    outputs: Sequence[int],
    gather: bool,
    bias: Tensor | None,
) -> Tensor:
    check_input(x, in_features, inner)
    check_bias(bias, sum(outputs), x)
    rows = x.numel() // in_features
    padded = [_padded(size) for size in outputs]
    y = x.new_empty(rows, sum(padded))
    if rows:
        z = x.new_empty(rows, sum(ranks))
        whole = _aligned(x.reshape(rows, in_features))
        added = y if bias is None else _aligned_bias(bias, outputs)
        config = config_for(x.dtype, rows)
        tiles = [
            sum(triton.cdiv(size, config.block_columns) for size in sizes)
            for sizes in (ranks, padded)
        ]
        sizes = {
            "rows": rows,
            "x_blocks": whole.stride(0) // ALIGNMENT,
            "z_blocks": z.shape[1] // ALIGNMENT,
            "y_blocks": y.shape[1] // ALIGNMENT,
            "groups": len(ranks),
            "has_bias": int(bias is not None),
            "GATHER": gather,
        }
        tensors = (whole, inner, channels, pivots, z, outer, added, y, groups, counters)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _launch(tensors, sizes, tiles, config)
    if padded != list(outputs):
        blocks = torch.split(y, padded, dim=1)
        y = torch.cat([b[:, :size] for b, size in zip(blocks, outputs, strict=True)], dim=1)
    return y.reshape(*x.shape[:-1], sum(outputs))


def _launch(
    tensors: tuple[Tensor, ...], sizes: dict[str, int], tiles: Sequence[int], config: Config
) -> None:
    """One launch or two; ``tiles`` of z and of y in one block of rows."""
    named = dict(zip(TENSORS, tensors, strict=True)) | sizes
    on_amd = torch.version.hip is not None
    options = compile_options(config, tensors[0].dtype, on_amd) | {"WIDEN": interpreted()}
    if config.single_launch:
        counts = {"shrink_tiles": tiles[0], "tiles": sum(tiles)}
        steps = [(kernels.shrink_expand, sum(tiles), counts)]
    else:
        row_blocks = triton.cdiv(sizes["rows"], config.block_rows)
        steps = [
            (kernel, row_blocks * count, {"tiles": count})
            for kernel, count in zip((kernels.shrink, kernels.expand), tiles, strict=True)
        ]
    for kernel, programs, counts in steps:
        given = named | counts
        taken = {name: given[name] for name in kernel.arg_names if name in given}
        kernel[(programs,)](**taken, **options)


def compile_options(config: Config, dtype: torch.dtype, on_amd: bool) -> dict[str, object]:
    """Compile-time arguments of every kernel of a configuration."""
    return {
        "PRECISION": precision(dtype),
        "BT": config.block_rows,
        "BN": config.block_columns,
        "BK": config.block_depth,
        "num_warps": config.warps,
        # AMD's compiler keeps loads under way in registers, and two stages are what it plans for.
        "num_stages": min(config.stages, 2) if on_amd else config.stages,
        "enable_fp_fusion": True,  # Triton's default changes between versions
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
    outputs: Sequence[int],
    gather: bool,
    bias: Tensor | None,
) -> Tensor:
    del inner, outer, channels, pivots, groups, counters, in_features, ranks, gather, bias
    return x.new_empty(*x.shape[:-1], sum(outputs))


define(
    "lowrank_triton(Tensor x, Tensor inner, Tensor outer, Tensor channels, Tensor pivots, "
    "Tensor groups, Tensor counters, int in_features, int[] ranks, int[] outputs, bool gather, "
    "Tensor? bias) -> Tensor",
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
