"""The measurements of a GPU ("card"), which say which plan its layers get.

tables/ has a file for each GPU that was measured; ``benchmarks/gpu/suite.py`` writes it. A layer
that no table covers uses Triton only if Triton is named.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from svdserve.kernels.triton.configs import Plan

FOLDER = Path(__file__).with_name("tables")


class Entry(BaseModel):
    """The plan of layers whose sizes are within those of the measured layers.

    Attributes:
        dtype: of x and the factors.
        columns: the fewest and the most columns of a factor of the measured layers (n - r or n,
            and r).
        plan: what was fastest for each number of rows; torch's two products if they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["bfloat16", "float16", "float32"]
    columns: tuple[PositiveInt, PositiveInt]
    plan: Plan

    def holds_for(self, dtype: torch.dtype, columns: Sequence[int]) -> bool:
        """Whether all factors of a layer have this dtype and columns in the measured range."""
        least, most = self.columns
        return getattr(torch, self.dtype) == dtype and least <= min(columns) <= max(columns) <= most


class Table(BaseModel):
    """All measurements of one GPU.

    Attributes:
        card: the name that torch gives to the GPU.
        machine: that it was measured on: versions, memory, multiprocessors.
        entries: a layer gets the first one that holds for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    card: str = Field(min_length=1)
    machine: dict[str, str | int | None]
    entries: tuple[Entry, ...]

    def plan(self, dtype: torch.dtype, columns: Sequence[int]) -> Plan | None:
        """The plan of a layer whose factors have these numbers of columns.

        None if no such layer was measured, or if torch's two products were always faster.
        """
        for entry in self.entries:
            if entry.holds_for(dtype, columns):
                return entry.plan if any(config.shrink for config in entry.plan) else None
        return None


def file_of(card: str) -> Path:
    """The path of the table of a GPU."""
    return FOLDER / f"{re.sub(r'[^A-Za-z0-9]+', '_', card)}.json"


def read_table(file: Path) -> Table:
    """The table in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no table.
    """
    return Table.model_validate_json(file.read_bytes())


def table_of(device: str) -> Table | None:
    """The table of the current device of a type; None if it has none. Does not wait for the device.

    Args:
        device: the type, such as "cuda" (also for AMD's GPUs).

    Raises:
        ValueError: the file of that GPU is no table.
    """
    if device != "cuda" or not torch.cuda.is_available():
        return None
    return _table_of_card(torch.cuda.get_device_name())


@cache
def _table_of_card(card: str) -> Table | None:
    file = file_of(card)
    return read_table(file) if file.is_file() else None
