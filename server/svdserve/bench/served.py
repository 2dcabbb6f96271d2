"""`svdserve bench --served`: the speed that clients of each model's server see, over the dense one.

Every server is started several times in turn, up to its first token. Then all run at once and
`vllm bench serve` loads them one after the other, A B C, C B A, ..., so that a ratio compares two
measurements that are seconds apart. Prompts are token ids of exact length.
"""

import asyncio
import contextlib
import json
import random
import socket
import statistics
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, PositiveInt, computed_field
from rich.console import Console
from rich.progress import track

from svdserve.bench.contenders import contenders
from svdserve.bench.launch import SERVE, Server, running
from svdserve.bench.options import ModelOptions
from svdserve.bench.ratios import StepWork, model_work
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.machine import Machine, this_machine
from svdserve.server.cpu_install import work_around
from svdserve.server.faults import EngineDied
from svdserve.server.metrics import ModelFacts, model_facts
from svdserve.server.serve import DEFAULT_HOST, check_model

Workload = Literal["decode", "prefill", "mixed"]
WORKLOADS: tuple[Workload, ...] = ("decode", "prefill", "mixed")
LATENCIES = ("ttft", "tpot", "itl")
STATISTICS = ("mean", "median", "p99")
THROUGHPUT = "output_tokens_per_second"
_CHUNK = 16  # tokens for each hash of a trace


class LoadOptions(ModelOptions):
    """What is measured; lengths are in tokens. If ``workloads`` is empty, servers only start."""

    starts: PositiveInt = Field(
        default=3, description="How many times each server is started, up to its first token."
    )
    concurrency: tuple[PositiveInt, ...] = Field(
        default=(1, 8, 32), description="The number of clients that use a server at once."
    )
    workloads: tuple[Workload, ...] = Field(
        default=WORKLOADS, description="The mix of prompt and output lengths of the requests."
    )
    requests: PositiveInt = Field(
        default=2, description="The number of requests of each client in a round."
    )
    max_len: int = Field(
        default=1024,
        ge=64,
        description="The largest number of tokens of a request, prompt and output together.",
    )

    def lengths(self, workload: Workload, clients: int, seed: int) -> list[tuple[int, int]]:
        """Tokens of prompt and output of every request of one measurement.

        ``mixed`` draws log-normal lengths with the means of ShareGPT, 161 and 338 tokens (Kwon et
        al. 2023, figure 11), cut to ``max_len``; the others are fixed.
        """
        count, half = clients * self.requests, self.max_len // 2
        if workload == "decode":
            return [(min(32, half), min(128, half))] * count
        if workload == "prefill":
            return [(half, 8)] * count
        draw = random.Random(seed)

        def length(mean: float) -> int:
            # σ = 1: then the median is mean / e^½.
            return max(4, min(half, round(draw.lognormvariate(0, 1) * mean / 1.6487)))

        return [(length(161), length(338)) for _ in range(count)]


@dataclass(frozen=True)
class Target:
    """One server.

    Attributes:
        name: in the results.
        directory: its model.
        command: serves the model.
        flags: of `vllm serve`, for this server only.
    """

    name: str
    directory: Path
    command: tuple[str, ...] = SERVE
    flags: tuple[str, ...] = ()


def targets_of(dense: Path, models: Sequence[Path], dtype: str) -> list[Target]:
    """The servers of all contenders (contenders.py), the dense model's first."""
    return [
        Target(one.name.rpartition("/")[2], one.directory, flags=("--load-format", one.load_format))
        for one in contenders(dense, models, dtype)
    ]


class Load(BaseModel):
    """One measurement: latencies in ms as ``<statistic>_<latency>_ms``, and tokens per second."""

    workload: Workload
    concurrency: int
    round: int
    figures: dict[str, float]


class ServerResult(BaseModel):
    """One server; times are seconds from its start to an answer on /health or to a first token."""

    name: str
    directory: str
    facts: ModelFacts
    ready_seconds: list[float] = Field(default_factory=list)
    first_token_seconds: list[float] = Field(default_factory=list)
    peak_resident_bytes: int = 0
    kv_token_bytes: int
    work: dict[str, StepWork]
    loads: list[Load] = Field(default_factory=list)

    def rounds(self, workload: str, concurrency: int, figure: str) -> list[float]:
        """The named figure in every round."""
        chosen = [
            load
            for load in self.loads
            if load.workload == workload and load.concurrency == concurrency
        ]
        return [load.figures[figure] for load in sorted(chosen, key=lambda load: load.round)]

    @property
    def stored_bytes(self) -> int:
        return self.facts.lowrank_bytes + self.facts.dense_bytes


class LoadRatio(BaseModel):
    """A figure over the first server's; a faster server has lower latencies, more throughput."""

    name: str
    workload: str
    concurrency: int
    figure: str
    median: float
    lowest: float
    highest: float


class LoadResult(BaseModel):
    """Everything that was measured; ``servers[0]`` is what the others are compared with."""

    options: LoadOptions
    machine: Machine
    servers: list[ServerResult]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratios(self) -> list[LoadRatio]:
        """Each other server's figures over the first one's; ``start`` ends at the first token."""
        first, *others = self.servers
        figures = [THROUGHPUT, *(f"{s}_{latency}_ms" for latency in LATENCIES for s in STATISTICS)]
        found = []
        for other in others:
            pair = other.first_token_seconds, first.first_token_seconds
            found.append(_ratio(other.name, "start", 0, "first_token_seconds", *pair))
            for workload in self.options.workloads:
                for clients in self.options.concurrency:
                    for figure in figures:
                        pair = (
                            other.rounds(workload, clients, figure),
                            first.rounds(workload, clients, figure),
                        )
                        found.append(_ratio(other.name, workload, clients, figure, *pair))
        return found

    def kv_tokens_gained(self, server: ServerResult) -> int:
        """Tokens of KV cache that fit into the bytes by which its weights are smaller."""
        return (self.servers[0].stored_bytes - server.stored_bytes) // server.kv_token_bytes


def _ratio(
    name: str, workload: str, clients: int, figure: str, ours: list[float], theirs: list[float]
) -> LoadRatio:
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return LoadRatio(
        name=name,
        workload=workload,
        concurrency=clients,
        figure=figure,
        median=statistics.median(rounds),
        lowest=min(rounds),
        highest=max(rounds),
    )


def run_load(targets: Sequence[Target], options: LoadOptions) -> LoadResult:
    """Start, load and measure every server.

    Args:
        targets: the others are compared with the first; its tokenizer is used for all.
        options: what is measured.

    Raises:
        UserError: a directory cannot be served, or the first has no tokenizer.
        EngineDied: a server ended or failed a request.
    """
    for target in targets:
        check_model(target.directory)
    tokenizer = targets[0].directory
    if not (tokenizer / "tokenizer_config.json").exists():
        raise UserError(f"{tokenizer} has no tokenizer; --served needs one to write its prompts")
    work_around()
    progress = partial(track, console=Console(stderr=True), transient=True)
    results = [_described(target, options) for target in targets]
    order = list(zip(targets, results, strict=True))
    with TemporaryDirectory(prefix="svdserve-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        for _ in progress(range(options.starts - bool(options.workloads)), "starting"):
            for target, result in order:
                with _started(target, result, options, folder) as server:
                    result.peak_resident_bytes = server.peak_resident_bytes()
            order.reverse()
        if not options.workloads:
            order = []
        served = [
            (stack.enter_context(_started(target, result, options, folder)), result)
            for target, result in progress(order, "starting")
        ]
        for number in progress(range(options.pairs + 1), "measuring"):
            for workload in options.workloads:
                for clients in options.concurrency:
                    trace = folder / "trace.jsonl"
                    lengths = options.lengths(workload, clients, number)
                    _write_trace(trace, lengths, first_hash=number << 32)
                    for server, result in served:
                        figures = _loaded(server, tokenizer, trace, len(lengths), clients)
                        if number:  # round 0 warms up
                            load = Load(
                                workload=workload,
                                concurrency=clients,
                                round=number,
                                figures=figures,
                            )
                            result.loads.append(load)
            served.reverse()
        for server, result in served:
            result.peak_resident_bytes = server.peak_resident_bytes()
    return LoadResult(options=options, machine=this_machine(), servers=results)


def _described(target: Target, options: LoadOptions) -> ServerResult:
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model, half = model_work(target.directory, dtype), options.max_len // 2
    work = {f"decode_{n}": model.decode(n, 32 + 64) for n in options.concurrency}
    return ServerResult(
        name=target.name,
        directory=str(target.directory),
        facts=model_facts(target.directory),
        kv_token_bytes=model.kv_bytes,
        work={**work, "prefill": model.prefill(half)},
    )


@contextlib.contextmanager
def _started(
    target: Target, result: ServerResult, options: LoadOptions, folder: Path
) -> Iterator[Server]:
    """A server that has answered with its first token; the times it took go to ``result``."""
    flags = [
        *("--dtype", options.dtype),
        *("--served-model-name", target.name),
        *("--max-model-len", str(options.max_len)),
        *("--max-num-seqs", str(max(options.concurrency))),
        *("--kv-cache-memory-bytes", str(options.kv_cache_bytes)),
        "--no-enable-prefix-caching",
        *(("--enforce-eager",) if options.eager else ()),
        *target.flags,
    ]
    log = folder / f"{target.name}.log"
    port = _free_port()
    serving = running(target.directory, DEFAULT_HOST, port, log, flags, command=target.command)
    with serving as server:
        result.ready_seconds.append(time.perf_counter() - server.started)
        _first_token(server.url, target.name)
        result.first_token_seconds.append(time.perf_counter() - server.started)
        yield server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((DEFAULT_HOST, 0))
        return int(probe.getsockname()[1])


def _first_token(url: str, model: str) -> None:
    body = json.dumps({"model": model, "prompt": [0], "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=600) as response:
        response.read()


def _write_trace(file: Path, lengths: list[tuple[int, int]], first_hash: int) -> None:
    """Write the trace from which `vllm bench serve` makes prompts: a hash for every 16 tokens."""
    lines = []
    for prompt, output in lengths:
        chunks = -(-prompt // _CHUNK)
        hashes = list(range(first_hash, first_hash + chunks))
        first_hash += chunks
        entry = {"timestamp": 0, "input_length": prompt, "output_length": output}
        lines.append(json.dumps(entry | {"hash_ids": hashes}) + "\n")
    file.write_text("".join(lines))


def _loaded(
    server: Server, tokenizer: Path, trace: Path, requests: int, clients: int
) -> dict[str, float]:
    """The figures of one run of `vllm bench serve`, in this process, as its imports are slow."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = parser.parse_args(
        [
            *("--base-url", server.url),
            *("--tokenizer", str(tokenizer)),
            *("--dataset-name", "timed_trace", "--dataset-path", str(trace), "--no-self-timed"),
            *("--num-prompts", str(requests), "--max-concurrency", str(clients)),
            *("--percentile-metrics", ",".join(LATENCIES), "--metric-percentiles", "99"),
            *("--temperature", "0", "--disable-tqdm", "--disable-shuffle"),
        ]
    )
    with contextlib.redirect_stdout(None):
        found: dict[str, Any] = asyncio.run(main_async(arguments))
    if found["completed"] != requests:
        raise EngineDied(f"{server.url} answered {found['completed']} of {requests} requests")
    names = [f"{s}_{latency}_ms" for latency in LATENCIES for s in STATISTICS]
    return {THROUGHPUT: found["output_throughput"], **{name: found[name] for name in names}}
