"""What the files of a model directory hold, read without svdserve."""

import json
import struct
from pathlib import Path


def file_bytes(directory: Path) -> dict[str, int]:
    """Bytes of factors and of other tensors, straight from the safetensors headers."""
    found = {"lowrank": 0, "dense": 0}
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            factor = name.rpartition(".")[2] in ("factor_in", "factor_out", "pivots")
            found["lowrank" if factor else "dense"] += end - start
    return found
