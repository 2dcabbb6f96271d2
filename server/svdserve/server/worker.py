"""What a vLLM worker tells about itself: the class behind ``--worker-extension-cls``.

vLLM adds the class to the bases of its worker (vllm/v1/worker/worker_base.py), and then
``collective_rpc`` can call ``svdserve_report`` by name on every worker. The API process and the
benchmark ask once, after the model has loaded, and watch the worker's memory from outside.
"""

import gc
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from svdserve.compression.system.memory import release

EXTENSION = "svdserve.server.worker.WorkerExtension"
METHOD = "svdserve_report"


class WorkerWeights(BaseModel):
    """Bytes of weights that one worker holds: its shards, and what every rank repeats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lowrank: int
    dense: int
    dense_equivalent: int


class WorkerReport(BaseModel):
    """One worker after it has loaded its model; memory in bytes.

    ``load_seconds`` and ``weights`` are None where another loader than svdserve's has loaded.
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
    checks: list[dict[str, Any]] = []
    """LayerCheck (verify.py) of every factored layer, as dictionaries; empty unless asked for."""

    @property
    def local(self) -> bool:
        """Whether the worker runs on this machine, so that its pid means something here."""
        return self.host == socket.gethostname()

    def resident_bytes(self) -> int:
        """Resident set now, shared pages included; only for a local worker."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def unique_bytes(self) -> int:
        """Memory that would be freed if the worker ended now; only for a local worker."""
        return int(psutil.Process(self.pid).memory_full_info().uss)


def slowest_load(reports: list[WorkerReport]) -> float | None:
    """Seconds after which every worker had its weights; None where none kept the time."""
    return max((r.load_seconds for r in reports if r.load_seconds is not None), default=None)


class WorkerExtension:
    """Methods that vLLM's worker gains; names carry our prefix because vLLM refuses clashes."""

    rank: int
    model_runner: Any

    def svdserve_report(self) -> dict[str, Any]:
        """Hand memory freed by loading back to the system, then describe this worker.

        A dict and not a WorkerReport: the engine sends plain values between processes only.
        """
        # Imports vLLM, which only workers need.
        from svdserve.server.plugin.loader import load_report

        gc.collect()
        release()  # Loading frees as much as it keeps.
        loaded = load_report(self.model_runner.get_model())
        report = WorkerReport(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            parent_pid=os.getppid(),
            load_seconds=None if loaded is None else loaded.seconds,
            weights=None if loaded is None else WorkerWeights(**asdict(loaded.stored)),
            kv_cache_bytes=_allocated_bytes(self.model_runner.kv_caches),
            device_bytes=_device_bytes(),
            checks=[] if loaded is None else [asdict(check) for check in loaded.checks],
        )
        return report.model_dump()


def _allocated_bytes(caches: Iterable[torch.Tensor | list[torch.Tensor]]) -> int:
    """Bytes behind the KV caches: layers are views of one allocation, or of a few."""
    tensors = (t for cache in caches for t in (cache if isinstance(cache, list) else [cache]))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _device_bytes() -> int | None:
    """Accelerator memory that this process has reserved; None on a CPU."""
    if not torch.accelerator.is_available():
        return None
    return int(torch.accelerator.memory_reserved())
