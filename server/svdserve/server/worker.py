"""What a vLLM worker reports once it has loaded its model (plugin/worker.py makes the report).

The API process and the benchmark ask for it once, after the model has loaded, and then measure the
worker's memory from outside.
"""

import socket

import psutil
from pydantic import BaseModel, ConfigDict

from svdserve.server.layer_checks import LayerCheck

EXTENSION = "svdserve.server.plugin.worker.WorkerExtension"
"""The value for vLLM's ``--worker-extension-cls``."""
LOAD_FORMAT = "svdserve"
"""The value of ``--load-format`` that names svdserve's model loader (plugin/loader.py)."""
METHOD = "svdserve_report"
"""The method of the extension, for ``collective_rpc``."""


class WorkerWeights(BaseModel):
    """Bytes of weights that one worker holds: its shards, and what every worker repeats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lowrank: int
    dense: int
    dense_equivalent: int


class WorkerReport(BaseModel):
    """One worker after it has loaded its model; memory in bytes.

    ``load_seconds`` and ``weights`` are None if another loader than svdserve's loaded the model.
    ``checks`` has a LayerCheck for every factored layer if the loader was to verify them, and is
    empty otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    host: str
    pid: int
    parent_pid: int
    load_seconds: float | None
    weights: WorkerWeights | None
    kv_cache_bytes: int
    device_bytes: int | None
    checks: list[LayerCheck] = []

    @property
    def local(self) -> bool:
        """Whether the worker runs on this machine, so that its pid is valid here."""
        return self.host == socket.gethostname()

    def resident_bytes(self) -> int:
        """Resident memory now, shared pages included; only for a local worker."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def unique_bytes(self) -> int:
        """Memory that would be freed if the worker ended now; only for a local worker."""
        return int(psutil.Process(self.pid).memory_full_info().uss)


def slowest_load(reports: list[WorkerReport]) -> float | None:
    """Seconds until the slowest worker had its weights; None if no worker measured it."""
    return max((r.load_seconds for r in reports if r.load_seconds is not None), default=None)
