"""Perplexity of a model directory, dense or compressed, on a text file.

The protocol is that of the SVD literature (SVD-LLM, arXiv 2403.07378): tokenise the whole text
without special tokens, cut it into chunks of equal length, average the next-token losses of all
chunks, and take the exponential.
"""

import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy

from svdserve.compression.evaluation.options import CHUNKS_OF_A_STEP
from svdserve.compression.format.codecs.base import FLOAT_DTYPES
from svdserve.compression.format.integrity import file_sha256
from svdserve.compression.format.reader import is_checkpoint, open_checkpoint
from svdserve.compression.format.tensors import TensorFiles
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.pipeline.calibration.texts import read_file
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.machine import Machine, this_machine

# If only the first chunks are needed, this much of the text is tokenised at first.
_CHARACTERS_PER_TOKEN, _CUT_TOKENS = 16, 64
LOSS_SLICE = 256  # positions whose logits are float32 at the same time
_DTYPES = ("auto", *(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES))


class Measurement(BaseModel):
    """The facts of an evaluation that are necessary to repeat it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    fingerprint: str | None = None
    """``TensorFiles.fingerprint`` of the model; None in results files of older versions."""
    recipe: dict[str, Any] | None = None
    """The recipe of a compressed model; None for a dense model."""
    dtype: str
    machine: Machine
    seconds: float
    measured_at: datetime


class Perplexity(Measurement):
    """Perplexity on one text."""

    perplexity: float
    mean_loss: float
    chunks: PositiveInt
    tokens: PositiveInt
    """Number of predicted tokens, seq_len − 1 for each chunk."""
    seq_len: PositiveInt
    text: str
    text_sha256: str


def perplexity(
    model_dir: Path,
    text: Path,
    *,
    seq_len: int = 2048,
    max_chunks: int | None = None,
    batch_size: int = CHUNKS_OF_A_STEP,
    dtype: str = "auto",
    device: str = "cpu",
    progress: bool = True,
) -> Perplexity:
    """Perplexity of the model in ``model_dir`` on a UTF-8 text file, which is taken verbatim.

    Args:
        seq_len: number of tokens in a chunk; a shorter rest of the text is not used.
        max_chunks: number of chunks to use; None for all.
        batch_size: number of chunks in a forward step.
        dtype: dtype of weights and activations; "auto" is the model's own. Losses are float32.

    Raises:
        UserError: the model or text does not exist, the text is shorter than one chunk, an option
            is invalid, or logits are not finite. No chunk is ever skipped.
    """
    from svdserve.compression.model.loading import load_model

    started = time.perf_counter()
    _check_options(seq_len, max_chunks, batch_size, dtype)
    chunks = text_chunks(model_dir, text, seq_len, max_chunks)
    model = load_model(model_dir, dtype, device)
    total = 0.0
    with torch.inference_mode():
        for first, batch in _batches(chunks, batch_size, progress):
            total += _loss(model, batch.to(device), first)
    tokens = chunks.shape[0] * (seq_len - 1)
    return Perplexity(
        perplexity=math.exp(total / tokens),
        mean_loss=total / tokens,
        chunks=chunks.shape[0],
        tokens=tokens,
        seq_len=seq_len,
        text=str(text),
        text_sha256=file_sha256(text),
        **measured(model_dir, model, device, started),
    )


def measured(model_dir: Path, model: Any, device: str, started: float) -> dict[str, Any]:
    """The fields of a Measurement.

    Args:
        model: the model that was loaded from ``model_dir``.
        started: the value of ``time.perf_counter`` at the start.
    """
    checkpoint = open_checkpoint(model_dir) if is_checkpoint(model_dir) else None
    files = checkpoint.files if checkpoint else TensorFiles(model_dir)
    return {
        "model": str(model_dir),
        "fingerprint": files.fingerprint,
        "recipe": checkpoint.config.recipe if checkpoint else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": this_machine(device),
        "seconds": time.perf_counter() - started,
        "measured_at": datetime.now(UTC),
    }


def _check_options(seq_len: int, max_chunks: int | None, batch_size: int, dtype: str) -> None:
    if seq_len < 2:
        raise UserError(f"seq_len {seq_len}: a chunk needs at least 2 tokens; give 2 or more")
    if max_chunks is not None and max_chunks < 1:
        raise UserError(f"max_chunks {max_chunks}: give at least 1, or leave it out for all")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: give at least 1")
    if dtype not in _DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; allowed: {', '.join(_DTYPES)}")


def text_chunks(model_dir: Path, text: Path, seq_len: int, max_chunks: int | None) -> Tensor:
    """Token ids [chunks, seq_len] of a text, without special tokens; a shorter rest is not used.

    Raises:
        UserError: the model or text does not exist, or the text is shorter than one chunk.
    """
    from svdserve.compression.model.building import check_ids, load_config, load_tokenizer

    read_json(model_dir / "config.json")
    tokenizer = load_tokenizer(model_dir)

    def encode(characters: int) -> list[int]:
        words = read_file(text, str(text), characters)
        ids: list[int] = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
        return ids

    # The last tokens of a cut text may differ from those of the whole text.
    start = (max_chunks or 0) * seq_len * _CHARACTERS_PER_TOKEN
    ids = encode(start) if start else []
    if len(ids) <= (max_chunks or 0) * seq_len + _CUT_TOKENS:
        ids = encode(-1)
    count = len(ids) // seq_len
    if count == 0:
        raise UserError(
            f"{text}: {len(ids)} tokens, less than one chunk of seq_len {seq_len}; give more text "
            "or a smaller seq_len"
        )
    count = min(count, max_chunks or count)
    chunks = torch.tensor(ids[: count * seq_len]).view(count, seq_len)
    check_ids(model_dir, load_config(model_dir), chunks, text)
    return chunks


def _batches(chunks: Tensor, batch_size: int, progress: bool) -> Iterator[tuple[int, Tensor]]:
    """Yield each batch with the index of its first chunk, and show a progress bar."""
    columns = (
        TextColumn("perplexity"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("chunks"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("", total=chunks.shape[0])
        for first in range(0, chunks.shape[0], batch_size):
            batch = chunks[first : first + batch_size]
            yield first, batch
            bar.advance(task, batch.shape[0])


def _loss(model: Any, batch: Tensor, first: int) -> float:
    """Sum of next-token losses of chunks [batch, seq_len]; ``first`` is the first chunk's index."""
    logits: Tensor = model(batch, use_cache=False).logits
    total = 0.0
    for row in range(batch.shape[0]):
        for start in range(0, batch.shape[1] - 1, LOSS_SLICE):
            stop = min(start + LOSS_SLICE, batch.shape[1] - 1)
            piece = logits[row, start:stop].float()
            if not bool(piece.sum().isfinite()):  # NaN and infinity survive every sum
                raise UserError(
                    f"chunk {first + row}: the logits of positions {start} to {stop - 1} are not "
                    "finite; the model is broken, or overflows in its dtype: try --dtype float32"
                )
            targets = batch[row, start + 1 : stop + 1]
            total += cross_entropy(piece, targets, reduction="sum").item()
    return total
