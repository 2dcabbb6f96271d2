"""Launches the kernels, or computes torch's products in their place.

Importing this module imports Triton.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from svdserve.kernels.triton import kernels
from svdserve.kernels.triton.configs import MOST_BLOCKS, Config, Tile
from svdserve.kernels.triton.layout import ALIGNMENT

PLAIN, GATHERED, IN_ORDER = (
    int(place.value) for place in (kernels.PLAIN, kernels.GATHERED, kernels.IN_ORDER)
)
_KERNELS = (kernels.shrink, kernels.expand, kernels.shrink_expand)
_ARGUMENTS = {name for kernel in _KERNELS for name in kernel.arg_names}
_COPIED = 1024  # columns of a row that one program of gather copies


def launch(
    tensors: dict[str, Tensor],
    sizes: dict[str, int],
    ranks: Sequence[int],
    outputs: Sequence[int],
    shrink: Tile,
    config: Config,
) -> None:
    """Compute y by one launch or two.

    Args:
        tensors, sizes: arguments of the kernels, by their names.
        ranks: of the parts, padded.
        outputs: of the parts, padded.
        shrink: the tile of the first kernel.
        config: has the tile of the second kernel and the kind of launch.

    Raises:
        ValueError: a shrink with split sums cannot take so many rows.
    """
    expand, rows = config.expand or shrink, sizes["rows"]
    x = tensors["x_ptr"]
    z = sums = x.new_empty(rows, sum(ranks))
    if shrink.splits > 1:
        if triton.cdiv(rows, shrink.rows) > MOST_BLOCKS:
            raise ValueError(f"{rows} rows; a split shrink takes {MOST_BLOCKS} blocks of rows")
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
        # A kernel gets its own arguments and the compiler's options, not other kernels' arguments.
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
        # AMD's compiler keeps pending loads in registers, and plans for two stages.
        "num_stages": min(tile.stages, 2) if on_amd else tile.stages,
        "enable_fp_fusion": True,  # Triton's default changes between versions
        **({"launch_pdl": True} if early else {}),
    }


def latent_by_products(
    x: Tensor,
    inner: Tensor,
    channels: Tensor,
    pivots: Tensor,
    ranks: Sequence[int],
    widths: Sequence[int],
    read: int,
) -> Tensor:
    """The latent z [rows, sum of ranks] of all parts by torch's products, after one gather."""
    rows = len(x)
    rest = x
    if read == GATHERED:
        z, rest = x.new_empty(rows, sum(ranks)), x.new_empty(rows, sum(widths))
        blocks = [size // ALIGNMENT for size in (x.stride(0), z.shape[1], rest.shape[1])]
        grid = rows, triton.cdiv(z.shape[1] + rest.shape[1], _COPIED)
        kernels.gather[grid](x, channels, pivots, z, rest, *blocks, BLOCK=_COPIED)
    elif read == IN_ORDER:
        # A copy, because products are added to z: a single row of x counts as contiguous, and
        # .contiguous() would return x itself.
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
            # beta=0 ignores the content of new memory, even NaN.
            own.addmm_(other, factor.view(rank, -1).T, beta=0 if read == PLAIN else 1)
    return z


def expand_by_products(
    z: Tensor,
    outer: Tensor,
    bias: Tensor | None,
    ranks: Sequence[int],
    outputs: Sequence[int],
    y: Tensor,
) -> None:
    """Write y [rows, sum of outputs] from z by torch's products."""
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


def precision(dtype: torch.dtype) -> str:
    """The ``input_precision`` of tl.dot; float32 is not rounded to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU (TRITON_INTERPRET=1)."""
    return not isinstance(kernels.shrink, triton.runtime.JITFunction)
