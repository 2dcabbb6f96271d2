"""FORMAT.md tells the truth: its blocks are read and computed here."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from svdserve.compression.format.factors import parameters

from svdserve.compression.format import checkpoint
from svdserve.compression.format.layouts import Factors
from svdserve.compression.format.schema import parse_config
from svdserve.kernels.reference import lowrank_linear, project


def blocks() -> list[dict[str, Any]]:
    text = (Path(checkpoint.__file__).parent / "FORMAT.md").read_text()
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("version", [1, 2])
def test_example_block_is_valid_and_complete(version: int) -> None:
    block = blocks()[version - 1]
    assert block["format_version"] == version
    assert parse_config(block).dump() == block


def test_worked_example() -> None:
    example = blocks()[2]
    value = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in example.items()}
    pivots = torch.tensor(example["pivots"], dtype=torch.int32)
    factors = Factors(value["factor_in"], value["factor_out"], pivots)
    assert torch.equal(factors.dense(), value["weight"])
    assert torch.equal(value["weight"] @ value["x"], value["y"])
    assert torch.equal(project(value["x"], factors.factor_in, pivots), value["projection"])
    got = lowrank_linear(value["x"], factors.factor_in, factors.factor_out, pivots)
    assert torch.equal(got, value["y"])
    assert parameters("interpolative", 4, 4, 2) == 12
