"""Prometheus gauges of the served model, next to vLLM's own at /metrics.

vLLM's counters and histograms are not repeated. All names begin with ``svdserve_`` and all values
are in base units. Several API servers (PROMETHEUS_MULTIPROC_DIR) merge their gauges: tokens per
second are summed over the live servers, since each server counts the requests that it answered.
Every other gauge has the same value in each server, and the latest value is taken.

A gauge keeps its last value, so ``watch`` sets those that change every second; an idle server shows
0 tokens per second.
"""

import asyncio
import logging
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path

import psutil
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from pydantic import BaseModel, ConfigDict

from svdserve.compression.format.reader import is_checkpoint, open_checkpoint
from svdserve.compression.format.tensors import TensorFiles
from svdserve.server.capacity import available_bytes
from svdserve.server.worker import WorkerReport, slowest_load

WINDOW_SECONDS = 10
_LONGEST_WAIT = 60.0
logger = logging.getLogger(f"vllm.{__name__}")
_COUNTERS = {
    "generation": "vllm:generation_tokens_total",
    "prompt": "vllm:prompt_tokens_total",
}


class ModelFacts(BaseModel):
    """What is served; bytes are those stored in the files. A dense model has keep ratio 1."""

    model_config = ConfigDict(frozen=True)

    method: str
    format_version: int
    layout: str
    base_model: str
    keep_ratio: float
    lowrank_bytes: int
    dense_bytes: int
    dense_equivalent_bytes: int


def model_facts(directory: Path) -> ModelFacts:
    """Read the facts from config.json and the safetensors headers.

    Raises:
        UserError: the directory holds neither an svdserve checkpoint nor safetensors.
    """
    if not is_checkpoint(directory):
        stored = sum(info.nbytes for info in TensorFiles(directory).info.values())
        return ModelFacts(
            method="dense",
            format_version=0,
            layout="dense",
            base_model=directory.name,
            keep_ratio=1.0,
            lowrank_bytes=0,
            dense_bytes=stored,
            dense_equivalent_bytes=stored,
        )
    checkpoint = open_checkpoint(directory)
    config, stored_bytes = checkpoint.config, checkpoint.stored_bytes()
    return ModelFacts(
        method=str(config.recipe.get("method", "unknown")),
        format_version=config.format_version,
        layout="+".join(sorted({spec.layout for spec in config.modules.values()})) or "dense",
        base_model=config.base_model,
        keep_ratio=config.keep,
        lowrank_bytes=stored_bytes["lowrank"],
        dense_bytes=stored_bytes["dense"],
        dense_equivalent_bytes=stored_bytes["dense_equivalent"],
    )


class TokenRate:
    """Tokens per second over a sliding window, from the samples of a counter that only grows."""

    def __init__(self, window: float = WINDOW_SECONDS) -> None:
        self._window = window
        self._samples: deque[tuple[float, float]] = deque()

    def add(self, seconds: float, tokens: float) -> float:
        """Add the counter's value at a time (seconds, any origin) and return the rate now."""
        self._samples.append((seconds, tokens))
        # One sample at or before the window's start stays, as the window's tokens count from it.
        while len(self._samples) > 1 and self._samples[1][0] <= seconds - self._window:
            self._samples.popleft()
        start, before = self._samples[0]
        return (tokens - before) / (seconds - start) if seconds > start else 0.0


class ServerMetrics:
    """The gauges of one API process.

    Args:
        name: the served model name, a label of every gauge.
        facts: of the model.
        processes: measures, on every call, the resident bytes of each process by its role.
        reports: of the workers; they are final.
        counters: the registry that holds vLLM's counters of this process.
    """

    def __init__(
        self,
        name: str,
        facts: ModelFacts,
        processes: Callable[[], dict[str, int]],
        reports: list[WorkerReport],
        counters: CollectorRegistry = REGISTRY,
    ) -> None:
        self._name = name
        self._processes = processes
        self._counters = counters.restricted_registry(list(_COUNTERS.values()))
        self._rates = {kind: TokenRate() for kind in _COUNTERS}
        self._tokens_per_second = {
            kind: _gauge(
                f"svdserve_{kind}_tokens_per_second",
                f"{kind.capitalize()} tokens per second over the last {WINDOW_SECONDS} seconds.",
                mode="livesum",
            )
            for kind in _COUNTERS
        }
        self._resident = _gauge(
            "svdserve_process_resident_bytes", "Resident memory of a process.", "process"
        )
        self._available = _gauge(
            "svdserve_memory_available_bytes",
            "Memory that the server could still get: of its control groups and of the machine.",
        )
        self._set_facts(facts, reports)
        self._set_reports(reports)

    def _set_facts(self, facts: ModelFacts, reports: list[WorkerReport]) -> None:
        labels = ("method", "format_version", "layout", "base_model")
        values = [str(getattr(facts, label)) for label in labels]
        info = _gauge("svdserve_model_info", "The served model; always 1.", *labels)
        info.labels(self._name, *values).set(1)
        keep = _gauge(
            "svdserve_keep_ratio", "Stored over dense parameters of the factored linears."
        )
        keep.labels(self._name).set(facts.keep_ratio)
        weights = _gauge("svdserve_weights_bytes", "Stored bytes of the weights.", "kind")
        weights.labels(self._name, "lowrank").set(facts.lowrank_bytes)
        weights.labels(self._name, "dense").set(facts.dense_bytes)
        equivalent = _gauge(
            "svdserve_dense_equivalent_bytes", "Bytes of the weights if all were dense."
        )
        equivalent.labels(self._name).set(facts.dense_equivalent_bytes)
        load_seconds = slowest_load(reports)
        if load_seconds is not None:
            load = _gauge("svdserve_model_load_seconds", "Loading of the weights, slowest worker.")
            load.labels(self._name).set(load_seconds)

    def _set_reports(self, reports: list[WorkerReport]) -> None:
        """Set the memory of each worker; TP ranks may sum to more than the files store."""
        self._set_by_worker(
            "svdserve_kv_cache_bytes",
            "Memory allocated for the KV cache.",
            {r.rank: r.kv_cache_bytes for r in reports},
        )
        self._set_by_worker(
            "svdserve_device_memory_bytes",
            "Accelerator memory reserved at start-up.",
            {r.rank: r.device_bytes for r in reports if r.device_bytes is not None},
        )
        loaded = {r.rank: r.weights for r in reports if r.weights is not None}
        self._set_by_worker(
            "svdserve_worker_dense_equivalent_bytes",
            "Bytes of the weights in a worker if all were dense.",
            {rank: weights.dense_equivalent for rank, weights in loaded.items()},
        )
        if loaded:
            held = _gauge(
                "svdserve_worker_weights_bytes", "Weights in a worker's memory.", "worker", "kind"
            )
            for rank, weights in loaded.items():
                held.labels(self._name, str(rank), "lowrank").set(weights.lowrank)
                held.labels(self._name, str(rank), "dense").set(weights.dense)

    def _set_by_worker(self, name: str, text: str, values: dict[int, int]) -> None:
        """Set one gauge by worker; no gauge is made if there are no values."""
        if values:
            gauge = _gauge(name, text, "worker")
            for rank, value in values.items():
                gauge.labels(self._name, str(rank)).set(value)

    def update(self, seconds: float) -> None:
        """Set the token rates and the memory; ``seconds`` is a monotonic clock's time."""
        self.update_rates(seconds)
        self.update_memory()

    def update_rates(self, seconds: float) -> None:
        """Set the gauges of tokens per second."""
        totals = dict.fromkeys(_COUNTERS, 0.0)
        for metric in self._counters.collect():
            for sample in metric.samples:
                for kind, counter in _COUNTERS.items():
                    if sample.name == counter:
                        totals[kind] += sample.value
        for kind, rate in self._rates.items():
            self._tokens_per_second[kind].labels(self._name).set(rate.add(seconds, totals[kind]))

    def update_memory(self) -> None:
        """Set the gauges of the processes' memory and of the memory that is available."""
        for process, resident in self._processes().items():
            self._resident.labels(self._name, process).set(resident)
        self._available.labels(self._name).set(available_bytes())

    async def watch(self, period: float = 1.0) -> None:
        """Update every ``period`` seconds until cancelled.

        A failure is logged once for each kind, and tried again after a wait that doubles up to a
        minute. Rates and memory are updated independently, so that one continues if the other
        fails.
        """
        clock = asyncio.get_running_loop().time
        readings = (lambda: self.update_rates(clock()), self.update_memory)
        await asyncio.gather(*(_repeat(reading, period) for reading in readings))


async def _repeat(reading: Callable[[], None], period: float) -> None:
    told, wait = set[tuple[type[Exception], str]](), period
    while True:
        try:
            reading()
            wait = period
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = type(error), f"{where.filename}:{where.lineno}"
            if kind not in told:
                told.add(kind)
                logger.exception("The svdserve gauges could not be updated; trying again")
            wait = max(period, min(2 * wait, _LONGEST_WAIT))
        await asyncio.sleep(wait)


def resident_bytes(pids: dict[str, int]) -> dict[str, int]:
    """Resident memory of the processes that still run, by role."""
    found = {}
    for role, pid in pids.items():
        try:
            found[role] = int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:  # the process has ended, or may not be inspected
            continue
    return found


def _gauge(name: str, text: str, *labels: str, mode: str = "livemostrecent") -> Gauge:
    return Gauge(name, text, ["model_name", *labels], multiprocess_mode=mode)  # type: ignore[arg-type]
