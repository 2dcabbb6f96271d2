"""Merging safetensors files, one for each block and so on, into a checkpoint's shards."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from svdserve.compression.format.tensors import INDEX_FILE, SINGLE_FILE

MAX_SHARD_BYTES = 5_000_000_000


def merge_shards(parts: list[Path], target: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Concatenate safetensors files into the folder ``target``, without loading a tensor.

    Writes one model.safetensors, or shards of at most ``max_bytes`` and an index. A file of
    ``parts`` is never split: one that is larger than ``max_bytes`` becomes a shard of its own.
    """
    headers = [_read_header(part) for part in parts]
    shards: list[list[int]] = [[]]
    filled = 0
    for index, (_, _, size) in enumerate(headers):
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += size
    names = (
        [SINGLE_FILE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    weight_map: dict[str, str] = {}
    for name, members in zip(names, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        base = 0
        for index in members:
            tensors, _, size = headers[index]
            for tensor, entry in tensors.items():
                start, end = entry["data_offsets"]
                header[tensor] = {**entry, "data_offsets": [start + base, end + base]}
                weight_map[tensor] = name
            base += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (target / name).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for index in members:
                with parts[index].open("rb") as part:
                    part.seek(headers[index][1])
                    shutil.copyfileobj(part, out, 1 << 22)
            out.flush()
            os.fsync(out.fileno())
    if len(shards) > 1:
        total = sum(size for _, _, size in headers)
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / INDEX_FILE).write_text(json.dumps(index_json, indent=2, sort_keys=True) + "\n")


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Tensor entries of a safetensors file, and offset and length of its data in bytes."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length, path.stat().st_size - 8 - length
