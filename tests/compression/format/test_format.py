"""FORMAT.md tells the truth: its blocks are read and computed here."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from svdserve.compression.format import reader
from svdserve.compression.format.layouts import INTERPOLATIVE
from svdserve.compression.format.schema import parse_config
from svdserve.kernels.reference import lowrank_linear, project


def blocks() -> list[dict[str, Any]]:
    text = (Path(reader.__file__).parent / "FORMAT.md").read_text()
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


def test_example_block_is_valid_and_complete() -> None:
    block, _ = blocks()
    assert block["format_version"] == 3
    assert parse_config(block).dump() == block


def test_worked_example() -> None:
    _, example = blocks()
    value = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in example.items()}
    factors = {name: value[name] for name in INTERPOLATIVE.matrices}
    factors["pivots"] = torch.tensor(example["pivots"], dtype=torch.int32)
    assert torch.equal(INTERPOLATIVE.dense(factors), value["weight"])
    assert torch.equal(value["weight"] @ value["x"], value["y"])
    part = INTERPOLATIVE.part(factors)
    assert torch.equal(project(value["x"], part.factor_in, part.pivots), value["latent"])
    assert torch.equal(lowrank_linear(value["x"], *part), value["y"])
    assert {name: tuple(t.shape) for name, t in factors.items()} == INTERPOLATIVE.shapes(4, 4, 2)
    assert INTERPOLATIVE.parameters(4, 4, 2) == 12
