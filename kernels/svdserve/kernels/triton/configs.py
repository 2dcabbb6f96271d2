"""How the Triton kernels divide their work, and for how many rows of x; imports no Triton.

A plan says which configuration runs for each number of rows. The plans that were measured on a GPU
are in its table (table.py). ``GUESSES`` are the plans for a GPU without a table, used only if
Triton is named. They were chosen by arithmetic and by what the compiler reports
(``python -m svdserve.kernels.triton.aot``).
"""

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter
from pydantic.dataclasses import dataclass

MOST_BLOCKS = 8  # row blocks of a shrink whose sums are split
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Tile:
    """How a kernel divides its work: a program computes [rows, columns] in steps of ``depth``.

    Attributes:
        splits: how many programs share the sum of one tile; more than 1 in shrink only.
        lines: how many pieces of 128 bytes of every row of the factor are prefetched while the
            kernel waits for its input.
    """

    rows: PositiveInt
    columns: PositiveInt
    depth: PositiveInt
    warps: PositiveInt
    stages: PositiveInt
    splits: PositiveInt = 1
    lines: NonNegativeInt = 0


@dataclass(frozen=True, config=_STRICT)
class Config:
    """How up to ``rows`` rows of x are multiplied (None: any number).

    Attributes:
        shrink, expand: their tiles; None for torch's products, after one gather.
        launch: both kernels in one launch; in two; or in two of which the second starts early
            (sm_90 and later).

    Raises:
        ValueError: one tile is given without the other, or the tiles cannot take so many rows.
    """

    rows: PositiveInt | None
    shrink: Tile | None = None
    expand: Tile | None = None
    launch: Literal["one", "two", "early"] = "two"

    def __post_init__(self) -> None:
        if self.shrink is None or self.expand is None:
            if self.shrink is not self.expand:
                raise ValueError("one of shrink and expand has a tile; give both one, or neither")
            return
        blocks = 1 if self.launch == "one" else MOST_BLOCKS if self.shrink.splits > 1 else None
        if blocks and (self.rows is None or self.rows > blocks * self.shrink.rows):
            raise ValueError(
                f"{self.rows or 'any number of'} rows; tiles of {self.shrink.rows} take "
                f"{blocks * self.shrink.rows} in one launch or with split sums"
            )


def _complete(configs: tuple[Config, ...]) -> tuple[Config, ...]:
    limits = [config.rows for config in configs]
    bounded = [limit for limit in limits[:-1] if limit is not None]
    if not limits or limits[-1] is not None or len(bounded) < len(limits) - 1:
        raise ValueError(
            "the last configuration of a plan, and no other, must be for any number of rows"
        )
    if any(more <= fewer for fewer, more in pairwise(bounded)):
        raise ValueError(f"the rows of a plan must ascend, found {bounded}")
    return configs


# In ascending order of rows; the last configuration is for any number of rows.
Plan = Annotated[tuple[Config, ...], AfterValidator(_complete)]
PRODUCTS = Config(None)
_PLAN: TypeAdapter[tuple[Config, ...]] = TypeAdapter(Plan)


def config_for(plan: Plan, rows: int) -> Config:
    """The configuration of a plan for this number of rows of x."""
    return next(config for config in plan if config.rows is None or rows <= config.rows)


@lru_cache(maxsize=256)
def to_text(plan: Plan) -> str:
    """The plan as JSON, because arguments of torch operations may be strings.

    Raises:
        ValueError: rows do not ascend, or the last configuration is not for any number of rows.
    """
    return _PLAN.dump_json(_complete(plan), exclude_defaults=True).decode()


@lru_cache(maxsize=256)
def from_text(text: str) -> Plan:
    """The plan of ``to_text``.

    Raises:
        ValueError: the text is no plan.
    """
    return _PLAN.validate_json(text)


def single(rows: int, tile: Tile) -> Config:
    """A configuration of one launch, with the same tile for shrink and expand."""
    return Config(rows, tile, replace(tile, splits=1), "one")


def double(rows: int | None, tile: Tile) -> Config:
    """A configuration of two launches with the same tile."""
    return Config(rows, tile, tile)


# Decoding is limited by the bytes of the weights, so small tiles keep all multiprocessors busy, and
# many stages keep enough loads in flight. Prefill is limited by arithmetic, so its tiles are large.
_HALF = (
    single(16, Tile(16, 16, 128, warps=2, stages=5)),
    single(64, Tile(64, 32, 64, warps=4, stages=6)),
    double(None, Tile(128, 128, 64, warps=8, stages=3)),
)
_SINGLE = (
    single(16, Tile(16, 32, 32, warps=4, stages=3)),
    double(None, Tile(64, 32, 32, warps=4, stages=3)),
)
GUESSES: dict[torch.dtype, Plan] = {
    torch.bfloat16: _HALF,
    torch.float16: _HALF,
    torch.float32: _SINGLE,
}
