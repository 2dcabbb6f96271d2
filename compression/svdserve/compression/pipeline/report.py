"""Reports of finished jobs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RefineReport:
    """Held-out KL in nats per token before and after a refinement, its steps and seconds."""

    directory: Path
    before: float
    after: float
    steps: int
    seconds: float
    made: bool = True
    """False where the output was complete before; the figures are those of the job that made it."""


@dataclass(frozen=True)
class Report:
    """Figures of a finished compression."""

    directory: Path
    seconds: float
    peak_bytes: int
    tokens: int
    stored_parameters: int
    dense_parameters: int
    refinement: RefineReport | None = None
    made: bool = True
    """False where the output was complete before; the figures are those of the job that made it."""

    def facts(self) -> dict[str, Any]:
        """The figures, as JSON."""
        named = ("seconds", "peak_bytes", "tokens", "stored_parameters", "dense_parameters")
        return {name: getattr(self, name) for name in named}
