"""The goals ("bars") of the serving benchmarks, written beside their measurements."""

import sys
from pathlib import Path

from pydantic import BaseModel, computed_field

from svdserve.bench.engine import BenchResult
from svdserve.bench.served import LoadResult
from svdserve.compression.system.files import write_results


class Bar(BaseModel):
    """One goal: ``measured`` must be within ``least`` and ``most``.

    ``over_dense`` and ``work_ratio`` are set if ``measured`` is their quotient.
    """

    model: str
    what: str
    measured: float
    least: float | None = None
    most: float | None = None
    over_dense: float | None = None
    work_ratio: float | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def reached(self) -> bool:
        """Whether the goal is reached."""
        enough = self.least is None or self.measured >= self.least
        return enough and (self.most is None or self.measured <= self.most)

    def __str__(self) -> str:
        parts = f" = {self.over_dense:.3f} / {self.work_ratio:.3f}" if self.work_ratio else ""
        limit = f"at most {self.most:g}" if self.least is None else f"at least {self.least:g}"
        verdict = "reached" if self.reached else "MISSED"
        return f"{self.model} {self.what}: {self.measured:.3f}{parts}, {limit}: {verdict}"


def share_bars(result: BenchResult, least: float) -> list[Bar]:
    """One goal for every model and workload: the measured ratio over its work ratio."""
    return [
        Bar(
            model=Path(ratio.directory).name,
            what=f"{ratio.workload} over its {ratio.limited_by} ratio",
            measured=ratio.median / ratio.work_ratio,
            least=least,
            over_dense=ratio.median,
            work_ratio=ratio.work_ratio,
        )
        for ratio in result.ratios
    ]


def report(result: BenchResult | LoadResult, bars: list[Bar], file: Path) -> int:
    """Print the goals and write them with the measurements; returns 1 if one is missed."""
    print(*bars, sep="\n")
    written = {
        "command": " ".join(["python", *sys.argv]),
        "result": result.model_dump(mode="json"),
        "bars": [bar.model_dump(exclude_none=True) for bar in bars],
    }
    write_results(file, written)
    return 0 if all(bar.reached for bar in bars) else 1
