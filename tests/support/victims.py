"""Small checkpoints for tests of what strangers write, and a reader of a few lines.

The reader shares nothing with svdserve: what that gives is compared with what the files hold.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from models import random_tokens, save_model
from svdserve.compression.format.log import LOG_FILE
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.format.writer import merge_shards


def whole_checkpoint(root: Path) -> Path:
    """A small checkpoint in one file, with a linear that stays dense."""
    dense = save_model("llama", root / "dense", num_hidden_layers=1)
    target = write_checkpoint(
        dense,
        root / "whole",
        layout="interpolative",
        shared=True,
        keep_dense=frozenset({"down_proj"}),
    )
    (target / LOG_FILE).touch()
    return target


def sharded_checkpoint(whole: Path) -> Path:
    """The same in three files with an index."""
    target = whole.with_name("sharded")
    shutil.copytree(whole, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = sorted(load_file(whole / SINGLE_FILE).items())
    parts = []
    for start in range(3):
        parts.append(target / f"part{start}")
        save_file(dict(tensors[start::3]), parts[-1])
    merge_shards(parts, target, 1)
    for part in parts:
        part.unlink()
    return target


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def stored_bytes(path: Path, name: str) -> bytes:
    header, start = read_header(path)
    first, last = header[name]["data_offsets"]
    return path.read_bytes()[start + first : start + last]


def check_as_declared(directory: Path) -> None:
    """What an accepted checkpoint gives is what its header says."""
    checkpoint = open_checkpoint(directory)
    names = list(checkpoint.files.info)
    tensors = checkpoint.files.load(names)
    for name, info in checkpoint.files.info.items():
        entry = read_header(info.file)[0][name]
        assert list(tensors[name].shape) == list(info.shape) == entry["shape"]
        raw = tensors[name].flatten().view(torch.uint8) if info.nbytes else torch.empty(0)
        assert raw.numpy().tobytes() == stored_bytes(info.file, name)
    for name, spec in checkpoint.config.modules.items():
        factors = checkpoint.factors(name)
        assert factors.rank == spec.rank
        assert {name: tuple(t.shape) for name, t in factors.tensors.items()} == spec.tensors()
        assert factors.dense(torch.float32).shape == (sum(spec.out_features), spec.in_features)


def with_header(raw: bytes, header: Any) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(random_tokens(1, 8)).logits
    return found
