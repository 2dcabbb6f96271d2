"""Factors, biases and channels in the layout of the kernels: zero padded to blocks of 16."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from svdserve.kernels.parts import Part, other_channels

ALIGNMENT = 16  # rows of every matrix begin at multiples of it; see kernels.py


def padded(size: int) -> int:
    """The size rounded up to whole blocks."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def aligned(matrix: Tensor, rows: bool = False) -> Tensor:
    """The matrix, zero padded to whole blocks of columns (and rows); no copy if it fits already."""
    height, width = matrix.shape
    missing = padded(width) - width, (padded(height) - height) if rows else 0
    if any(missing):
        return pad(matrix, (0, missing[0], 0, missing[1]))
    dense = matrix.is_contiguous() if rows else matrix.stride(1) == 1
    fits = matrix.stride(0) % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0
    return matrix if dense and fits else matrix.clone(memory_format=torch.contiguous_format)


def aligned_bias(bias: Tensor, outputs: Sequence[int]) -> Tensor:
    """The bias of all parts, each padded to whole blocks; no copy if it fits already."""
    if all(size % ALIGNMENT == 0 for size in outputs):
        fits = bias.data_ptr() % ALIGNMENT == 0 and bias.is_contiguous()
        return bias if fits else bias.clone(memory_format=torch.contiguous_format)
    own = torch.split(bias, list(outputs))
    return torch.cat([pad(block, (0, -len(block) % ALIGNMENT)) for block in own])


def channels_of(part: Part) -> tuple[Tensor, Tensor]:
    """The pivots of a part and its other channels; all channels and no pivots for a pair."""
    if part.pivots is None:
        everything = torch.arange(part.in_features, device=part.factor_in.device)
        return everything[:0], everything
    return part.pivots, other_channels(part.pivots, part.in_features)


def indices(channels: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The channels of all parts (int32), each part's padded with -1 to its size."""
    whole = [
        pad(own.to(torch.int32), (0, size - len(own)), value=-1)
        for own, size in zip(channels, sizes, strict=True)
    ]
    return flat(whole)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements as one vector; a single contiguous tensor is not copied."""
    own = [tensor.detach().reshape(-1) for tensor in tensors]
    return own[0] if len(own) == 1 else torch.cat(own)


@lru_cache(maxsize=4096)
def make_part_table(
    ranks: tuple[int, ...], widths: tuple[int, ...], outputs: tuple[int, ...], device: torch.device
) -> Tensor:
    """The table of parts (see kernels.py), int32 [parts, 8].

    It is cached, because a CUDA graph cannot hold the copy of the table to the device.
    """
    whole = [padded(size) for size in outputs]
    columns = (
        ranks,
        widths,
        whole,
        _starts(rank * width for rank, width in zip(ranks, widths, strict=True)),
        _starts(size * rank for size, rank in zip(whole, ranks, strict=True)),
        _starts(widths),
        _starts(ranks),
        _starts(whole),
    )
    table = torch.tensor(columns).T.contiguous() // ALIGNMENT
    return table.to(device=device, dtype=torch.int32)


def _starts(sizes: Iterator[int] | Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))[:-1]
