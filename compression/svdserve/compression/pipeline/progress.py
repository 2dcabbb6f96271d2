"""The progress of a job: a bar on the terminal and a JSONL log."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import progress as bars
from rich.console import Console

from svdserve.compression.format.log import log_event
from svdserve.compression.system.files import write_text


def bar(show: bool) -> bars.Progress:
    """A progress bar on stderr with count, elapsed time, ETA and the task's field ``facts``."""
    return bars.Progress(
        bars.SpinnerColumn(),
        bars.TextColumn("[bold]{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("ETA"),
        bars.TimeRemainingColumn(elapsed_when_finished=False),
        bars.TextColumn("{task.fields[facts]}"),
        console=Console(stderr=True),
        disable=not show,
    )


class Progress:
    """Logs events to ``log`` and, if ``show`` is True, draws a bar over the blocks.

    Events: ``start`` (the signature of the job), ``resumed_anyway`` (before, after), ``dense``
    (bytes of the dense model and of its linears), ``scores`` (state of the learning), ``gradients``
    (index, solve_seconds of the spectra), ``group`` (module, rank, error, beta, solve_seconds,
    pass_seconds), ``block_refinement`` (held-out squared error before and at best), ``block``
    (index, seconds, peak_bytes, error) and ``done``. After them come the events of a refinement and
    ``published`` (workdir.py).
    """

    def __init__(self, log: Path, blocks: int, show: bool) -> None:
        self._path = log
        self._bar = bar(show)
        self._task = self._bar.add_task("calibration tokens", total=blocks, facts="")
        self._facts: list[str] = []
        self._begun = time.perf_counter()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def truncate(self, blocks: int) -> None:
        """Keep the group and block lines of the first ``blocks`` blocks of an earlier run."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break  # the line was cut off when the job was killed
            if entry.get("index", blocks) < blocks:
                kept.append(line)
        write_text(self._path, "".join(line + "\n" for line in kept))

    def event(self, kind: str, **fields: Any) -> None:
        log_event(self._path, kind, **fields)

    def gradients(self, index: int, solve_seconds: float) -> None:
        """Log that the sweep, which goes from the last block to the first, finished a block."""
        self.event("gradients", index=index, solve_seconds=round(solve_seconds, 4))
        self._bar.update(self._task, description=f"gradients, block {index}")

    def group(self, index: int, path: str) -> None:
        """Show the current group on the bar."""
        self._bar.update(self._task, description=f"block {index} {path}")

    def solved(self, index: int, module: str, **facts: Any) -> None:
        """Log one module and add its error and β to the line of its block."""
        self.event("group", index=index, module=module, **facts)
        beta = "" if facts.get("beta") is None else f" β {facts['beta']:.2f}"
        self._facts.append(f"{module.rpartition('.')[2]} {facts['error']:.3f}{beta}")
        self._bar.update(self._task, facts=" · ".join(self._facts))

    def refined(self, index: int, before: float, best: float, **facts: Any) -> None:
        """Log the held-out squared error of a refined block."""
        self.event("block_refinement", index=index, before=before, best=best, **facts)
        self._facts.append(f"error² {before:.2e} → {best:.2e}")

    def block(self, index: int, peak_bytes: int, error: float | None) -> None:
        """Advance the bar by a block, and log the block unless an earlier run has finished it.

        ``error`` is the error of the student's hidden states behind the block.
        """
        seconds = time.perf_counter() - self._begun
        if self._facts:
            facts = {"seconds": round(seconds, 3), "peak_bytes": peak_bytes, "error": error}
            self.event("block", index=index, **facts)
            self._bar.console.print(
                f"block {index:3d}  {seconds:6.1f} s  {peak_bytes / 2**20:7.0f} MiB  "
                + " · ".join(self._facts),
                highlight=False,
            )
        self._facts = []
        self._begun = time.perf_counter()
        self._bar.update(self._task, advance=1, facts="")
