"""What was measured on a card: which plan its layers get. ``benchmarks/gpu/suite.py`` writes it.

tables/ has a file for each card that was measured. What no table speaks for is not taken unless
somebody asks for it.
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
    """The plan of layers that are like those that were measured.

    Attributes:
        dtype: of x and the factors.
        columns: the fewest and the most columns of a factor of the measured layers (n - r or n,
            and r).
        plan: what was fastest for how many rows; the two products where they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["bfloat16", "float16", "float32"]
    columns: tuple[PositiveInt, PositiveInt]
    plan: Plan

    def holds_for(self, dtype: torch.dtype, columns: Sequence[int]) -> bool:
        """Whether all factors of a layer are of this dtype and within what was measured."""
        least, most = self.columns
        return getattr(torch, self.dtype) == dtype and least <= min(columns) <= max(columns) <= most


class Table(BaseModel):
    """All that was measured on one card.

    Attributes:
        card: its name, as torch gives it.
        machine: on which it was measured: versions, memory, multiprocessors.
        entries: the first that holds for a layer is taken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    card: str = Field(min_length=1)
    machine: dict[str, str | int | None]
    entries: tuple[Entry, ...]

    def plan(self, dtype: torch.dtype, columns: Sequence[int]) -> Plan | None:
        """The plan of a layer with so many columns of each factor.

        None where no layer like it was measured, or where the two products always won.
        """
        for entry in self.entries:
            if entry.holds_for(dtype, columns):
                return entry.plan if any(config.shrink for config in entry.plan) else None
        return None


def file_of(card: str) -> Path:
    """Where the table of a card belongs."""
    return FOLDER / f"{re.sub(r'[^A-Za-z0-9]+', '_', card)}.json"


def read_table(file: Path) -> Table:
    """The table in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table.
    """
    return Table.model_validate_json(file.read_bytes())


def table_of(device: str) -> Table | None:
    """The table of the card that a type of device is at present; None where there is none.

    Args:
        device: such as "cuda", which is also AMD's. It waits for nothing on it.

    Raises:
        ValueError: the file of that card is no table.
    """
    if device != "cuda" or not torch.cuda.is_available():
        return None
    return _table_of_card(torch.cuda.get_device_name())


@cache
def _table_of_card(card: str) -> Table | None:
    file = file_of(card)
    return read_table(file) if file.is_file() else None
