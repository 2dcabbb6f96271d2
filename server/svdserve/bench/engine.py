"""`svdserve bench`: how much faster compressed models decode and prefill than their dense model.

All engines are loaded at once and measured in turn, A B C, C B A, ..., so that other work on the
machine affects every model alike; a ratio compares two measurements that are seconds apart. The
dense model runs twice, as vLLM has it and as the fair baseline (contenders.py). An engine's speed
may depend on the memory that it happened to get, which several starts of all engines show. Medians
are reported with the extremes of the rounds, beside the bytes ratio of a decoding step or the
operations ratio of prefill (ratios.py). Each engine is a process (worker.py).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field, PositiveInt, computed_field
from rich.console import Console
from rich.progress import track
from rich.table import Table

from svdserve.bench.contenders import STOCK, Contender, contenders
from svdserve.bench.options import ModelOptions
from svdserve.bench.plots import Point, draw
from svdserve.bench.ratios import StepWork, model_work
from svdserve.bench.worker import EngineOptions
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.machine import Machine, this_machine
from svdserve.kernels.cpu import openmp_libraries
from svdserve.server.cpu_install import work_around
from svdserve.server.faults import EngineDied
from svdserve.server.metrics import ModelFacts, model_facts
from svdserve.server.serve import check_model

Member = TypeVar("Member")
Item = TypeVar("Item")


class BenchOptions(ModelOptions):
    """What is measured; lengths are in tokens."""

    dense: Path
    models: tuple[Path, ...] = Field(min_length=1)
    starts: PositiveInt = Field(
        default=1, description="How many times all engines are started and measured."
    )
    batch_sizes: tuple[PositiveInt, ...] = Field(
        default=(1, 8, 32), description="The number of sequences that are decoded together."
    )
    prompt_len: PositiveInt = Field(
        default=32, description="The number of prompt tokens when decoding is measured."
    )
    output_len: int = Field(
        default=64, ge=2, description="The number of tokens that are decoded for each prompt."
    )
    prefill_len: PositiveInt = Field(
        default=512, description="The number of prompt tokens when prefill is measured."
    )

    @property
    def contenders(self) -> list[Contender]:
        """What is measured, the dense model first."""
        return contenders(self.dense, self.models, self.dtype)

    @property
    def workloads(self) -> tuple[str, ...]:
        """The names of the workloads, in the order of their measurement."""
        return (*(f"decode_{batch}" for batch in self.batch_sizes), f"prefill_{self.prefill_len}")

    def work(self, directory: Path) -> dict[str, StepWork]:
        """For each workload, what one step of the model must read and compute."""
        model = model_work(directory, None if self.dtype == "auto" else getattr(torch, self.dtype))
        context = self.prompt_len + self.output_len // 2  # halfway through
        steps = [model.decode(batch, context) for batch in self.batch_sizes]
        return dict(zip(self.workloads, [*steps, model.prefill(self.prefill_len)], strict=True))


class ModelResult(BaseModel):
    """One model: its size, its memory after loading in bytes, and tokens per second by workload.

    Seconds and memory are those of the first start; tokens per second are those of all starts, in
    order.
    """

    directory: str
    load_format: str = STOCK
    facts: ModelFacts
    start_seconds: float
    load_seconds: float | None
    resident_bytes: int
    unique_bytes: int
    device_bytes: int | None
    work: dict[str, StepWork]
    tokens_per_second: dict[str, list[float]] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        return Contender(Path(self.directory), self.load_format).name

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights in the files."""
        return self.facts.lowrank_bytes + self.facts.dense_bytes


class Ratio(BaseModel):
    """A model's tokens per second over the dense model's, round by round.

    Attributes:
        limited_by: what limits the workload: a decoding step's bytes or prefill's operations.
        work_ratio: the bytes ratio or the operations ratio (ratios.py).
    """

    directory: str
    workload: str
    rounds: list[float]
    median: float
    lowest: float
    highest: float
    limited_by: Literal["bytes", "operations"]
    work_ratio: float


class BenchResult(BaseModel):
    """All measurements: of the dense model as vLLM has it and the compressed ones, in this order.

    ``fair`` is the dense model with svdserve's kernels, where it would not be the same.
    """

    options: BenchOptions
    machine: Machine
    models: list[ModelResult]
    fair: ModelResult | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratios(self) -> list[Ratio]:
        """Each compressed model and workload over dense."""
        return [ratio for model in self.models[1:] for ratio in self.over_dense(model)]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fair_ratios(self) -> list[Ratio]:
        """The fair baseline over dense, by workload."""
        return self.over_dense(self.fair) if self.fair else []

    @property
    def compared(self) -> list[ModelResult]:
        """Everything but the dense model as vLLM has it, in the order of the tables."""
        return [*([self.fair] if self.fair else []), *self.models[1:]]

    def over_dense(self, model: ModelResult) -> list[Ratio]:
        """Each workload of one of the models over dense."""
        return [_ratio(model, self.models[0], name) for name in self.options.workloads]


def _ratio(model: ModelResult, dense: ModelResult, workload: str) -> Ratio:
    pairs = zip(model.tokens_per_second[workload], dense.tokens_per_second[workload], strict=True)
    rounds = [fast / slow for fast, slow in pairs]
    mine, theirs = model.work[workload], dense.work[workload]
    decodes = workload.startswith("decode")
    return Ratio(
        directory=model.directory,
        workload=workload,
        rounds=rounds,
        median=statistics.median(rounds),
        lowest=min(rounds),
        highest=max(rounds),
        limited_by="bytes" if decodes else "operations",
        work_ratio=mine.bytes_ratio(theirs) if decodes else mine.operations_ratio(theirs),
    )


def run_bench(options: BenchOptions) -> BenchResult:
    """Load all contenders, measure them in turn, and return every figure.

    Raises:
        UserError: a directory cannot be served, or a model's context is too short.
        EngineDied: an engine process ended; the message holds the end of its log.
    """
    results: list[ModelResult] = []
    for start in range(options.starts):
        with start_engines(options, last_first=bool(start % 2)) as engines:
            results = results or [
                ModelResult(
                    directory=str(one.directory),
                    load_format=one.load_format,
                    facts=model_facts(one.directory),
                    work=options.work(one.directory),
                    **engine.description,
                )
                for one, engine in zip(options.contenders, engines, strict=True)
            ]
            members = list(zip(engines, results, strict=True))
            for counts, workload, call, (engine, result) in turns(members, options):
                speed = engine.call(call)
                if counts:
                    result.tokens_per_second.setdefault(workload, []).append(speed)
    fair = next((result for result in results if result.load_format != STOCK), None)
    models = [result for result in results if result is not fair]
    return BenchResult(options=options, machine=this_machine(), models=models, fair=fair)


@contextmanager
def start_engines(
    options: BenchOptions, last_first: bool = False
) -> Iterator[list["EngineProcess"]]:
    """The engines of all contenders, loaded; their processes end with the context.

    Args:
        options: of the benchmark.
        last_first: load the dense model last; it is yielded first in either case.

    Raises:
        UserError: a directory cannot be served, or a model's context is too short.
        EngineDied: an engine process ended; the message holds the end of its log.
    """
    for directory in (options.dense, *options.models):
        check_model(directory)
        _check_context(directory, _context(options))
    work_around()
    order = -1 if last_first else 1
    with ExitStack() as stack:
        engines = [
            stack.enter_context(_engine(contender, options))
            for contender in _shown(options.contenders[::order], "loading")
        ]
        yield engines[::order]


def turns(
    members: Sequence[Member], options: BenchOptions
) -> Iterator[tuple[bool, str, dict[str, Any], Member]]:
    """All measurements in order; the members take turns, A B C, C B A, ...

    Yields:
        Whether the measurement counts (the first round warms up), the workload, the call of
        worker.Engine that measures it, and the member.
    """
    order = list(members)
    for number in _shown(range(options.pairs + 1), "measuring"):
        for workload, call in _calls(options, seed=number):
            for member in order:
                yield number > 0, workload, call, member
        order.reverse()


def _shown(items: Sequence[Item], what: str) -> Iterable[Item]:
    return track(items, what, console=Console(stderr=True), transient=True)


def print_bench(result: BenchResult) -> None:
    """Print sizes and ratios as tables."""
    options, machine = result.options, result.machine
    dense = result.models[0]
    rounds = options.pairs * options.starts
    sizes = Table(title="Models")
    for heading in ("model", "keep", "weights MiB", "resident MiB", "start s"):
        sizes.add_column(heading, justify="left" if heading == "model" else "right")
    for model in (dense, *result.compared):
        amounts = (model.stored_bytes / 2**20, model.resident_bytes / 2**20, model.start_seconds)
        sizes.add_row(model.name, f"{model.facts.keep_ratio:g}", *(f"{n:,.0f}" for n in amounts))
    speeds = Table(
        title=f"Tokens/s over dense: median, range of {rounds} rounds, bytes or operations ratio",
        caption=f"{machine.processor}, {machine.cores} cores, "
        f"{'eager' if options.eager else 'compiled'}, dtype {options.dtype}",
    )
    speeds.add_column("model")
    for workload in options.workloads:
        speeds.add_column(workload, justify="right")
    absolute = [statistics.median(dense.tokens_per_second[name]) for name in options.workloads]
    speeds.add_row(f"{dense.name}, tok/s", *(f"{speed:,.1f}" for speed in absolute))
    for model in result.compared:
        cells = (
            f"{r.median:.2f}\n{r.lowest:.2f}-{r.highest:.2f}\n{r.limited_by} {r.work_ratio:.2f}"
            for r in result.over_dense(model)
        )
        speeds.add_row(model.name, *cells)
    console = Console()
    console.print(sizes)
    console.print(speeds)


def plot_bench(result: BenchResult, file: Path) -> None:
    """Tokens per second over dense by workload; UserError if matplotlib is not installed."""
    models = {
        model.name: [
            Point(r.workload.replace("_", " "), r.median, r.lowest, r.highest, r.work_ratio)
            for r in result.over_dense(model)
        ]
        for model in result.compared
    }
    title = f"{result.machine.processor}, {'eager' if result.options.eager else 'compiled'}"
    draw({title: models}, file, result.models[0].name, "tokens/s over dense")


def _calls(options: BenchOptions, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each workload and the call of worker.Engine that measures it."""
    lengths = {"prompt_len": options.prompt_len, "output_len": options.output_len}
    *decode, prefill = options.workloads
    for workload, batch in zip(decode, options.batch_sizes, strict=True):
        yield workload, {"method": "decode", "batch": batch, "seed": seed, **lengths}
    yield prefill, {"method": "prefill", "prompt_len": options.prefill_len, "seed": seed}


def _context(options: BenchOptions) -> int:
    return max(options.prompt_len + options.output_len, options.prefill_len + 1)


def _check_context(directory: Path, needed: int) -> None:
    limit = read_json(directory / "config.json").get("max_position_embeddings")
    if limit is not None and limit < needed:
        raise UserError(
            f"{directory}: its context holds {limit} tokens, the benchmark needs {needed}; "
            "lower --prefill-len, --prompt-len or --output-len"
        )


class EngineProcess:
    """A worker process, as its parent sees it; ``call`` sends a message and returns the answer."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path, options: EngineOptions) -> None:
        self._process = process
        self._log = log
        self.directory = options.directory
        self.description: dict[str, Any] = self.call(asdict(options))

    def call(self, message: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = ""
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise EngineDied(f"the engine of {self.directory} died:\n{tail}")
        return json.loads(answer)


@contextmanager
def _engine(contender: Contender, options: BenchOptions) -> Iterator[EngineProcess]:
    """A loaded engine; its process ends with the context."""
    batch = max(options.batch_sizes)
    engine_options = EngineOptions(
        directory=str(contender.directory),
        load_format=contender.load_format,
        dtype=options.dtype,
        eager=options.eager,
        max_model_len=_context(options),
        max_num_seqs=batch,
        # A whole batch of prompts fits one step, so that decode steps hold decodes only.
        max_num_batched_tokens=max(batch * options.prompt_len, _context(options)),
        kv_cache_bytes=options.kv_cache_bytes,
    )
    with tempfile.TemporaryDirectory(prefix="svdserve-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "svdserve.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | _environment(),
            )
        try:
            yield EngineProcess(process, log, engine_options)
        finally:
            process.kill()
            process.communicate()


def _environment() -> dict[str, str]:
    """Variables that put engine and worker in one process, bound to this process's cores.

    vLLM does the same for its worker processes (utils/ompmultiprocessing.py, platforms/cpu.py): it
    binds threads to cores and loads torch's own OpenMP first, so that no second copy competes.
    """
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(len(cores)),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cores)),
    }
    libraries = openmp_libraries()
    return environment | ({"LD_PRELOAD": str(libraries[0])} if libraries else {})
