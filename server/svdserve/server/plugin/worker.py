"""The class behind ``--worker-extension-cls``: what svdserve asks of every vLLM worker.

vLLM adds it to the bases of its worker (vllm/v1/worker/worker_base.py), and then ``collective_rpc``
can call ``svdserve_report`` by name on every worker.
"""

import gc
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from svdserve.compression.system.memory import release
from svdserve.server.plugin.loader import load_report
from svdserve.server.worker import WorkerReport, WorkerWeights


class WorkerExtension:
    """Methods that vLLM's worker gains; the prefix keeps them apart from vLLM's own methods."""

    rank: int
    model_runner: Any

    def svdserve_report(self) -> dict[str, Any]:
        """Return the memory that loading freed to the system, then describe this worker.

        The result is the dict of a WorkerReport, because the engine sends only plain values between
        processes.
        """
        gc.collect()
        release()  # loading has freed about as much memory as the weights take
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
            checks=[] if loaded is None else list(loaded.checks),
        )
        return report.model_dump()


def _allocated_bytes(caches: Iterable[torch.Tensor | list[torch.Tensor]]) -> int:
    """Bytes of the KV caches' storages, each counted once: layers are views of one or a few."""
    tensors = (t for cache in caches for t in (cache if isinstance(cache, list) else [cache]))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _device_bytes() -> int | None:
    """Accelerator memory that this process has reserved; None on a CPU."""
    if not torch.accelerator.is_available():
        return None
    return int(torch.accelerator.memory_reserved())
