"""The gauges: facts against the files, rates against counters, several processes against sums.

The real server of the last tests has two API servers and two tensor-parallel workers.
"""

import asyncio
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    generate_latest,
    multiprocess,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from files import file_bytes
from models import save_model
from ports import free_port
from svdserve.bench.launch import running
from svdserve.compression.system.errors import UserError
from svdserve.server import metrics
from svdserve.server.metrics import TokenRate, model_facts, resident_bytes
from traffic import complete


def test_facts_agree_with_the_files(tmp_path: Path) -> None:
    dense = save_model("qwen2", tmp_path / "dense")
    target = write_checkpoint(dense, tmp_path / "low", layout="pair", shared=False)
    facts, stored, all_dense = model_facts(target), file_bytes(target), file_bytes(dense)
    assert (facts.lowrank_bytes, facts.dense_bytes) == (stored["lowrank"], stored["dense"])
    assert 0 < facts.lowrank_bytes < all_dense["dense"]
    assert facts.dense_equivalent_bytes == all_dense["dense"]
    assert (facts.layout, facts.format_version, facts.base_model) == ("pair", 3, "dense")


def test_facts_of_a_dense_model(tmp_path: Path) -> None:
    directory = save_model("llama", tmp_path)
    facts, stored = model_facts(directory), file_bytes(directory)
    assert (facts.method, facts.keep_ratio, facts.lowrank_bytes) == ("dense", 1.0, 0)
    assert facts.dense_bytes == facts.dense_equivalent_bytes == stored["dense"] > 0


def test_facts_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="safetensors"):
        model_facts(tmp_path)


def test_rate_is_exact_within_the_window_and_zero_after_it() -> None:
    rate = TokenRate(window=10)
    assert rate.add(100, 7) == 0  # A counter that did not start at 0 is no burst.
    assert [rate.add(100 + t, 7 + 5 * t) for t in range(1, 21)] == [5] * 20
    idle = [rate.add(120 + t, 107) for t in range(1, 12)]
    assert idle == [pytest.approx(max(0, 10 - t) * 5 / 10) for t in range(1, 12)]
    assert idle[-1] == 0


def test_rate_after_a_pause_between_samples() -> None:
    """Samples that come late are spread over the time that they took, not over the window."""
    rate = TokenRate(window=10)
    rate.add(0, 0)
    assert rate.add(40, 400) == 10
    assert rate.add(41, 400) == pytest.approx(400 / 41)
    assert rate.add(51, 400) == 0


def test_resident_bytes_skips_processes_that_ended() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    found = resident_bytes({"here": os.getpid(), "gone": ended.pid})
    statm = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert list(found) == ["here"]
    assert found["here"] == pytest.approx(statm, rel=0.1)


def test_watching_outlives_what_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker ends and, after very many failures, another takes its role; the rates go on."""
    monkeypatch.setattr(metrics, "_LONGEST_WAIT", 0.0)
    # vLLM's logger hands nothing on to the root's handlers once vLLM is imported.
    metrics.logger.addHandler(caplog.handler)
    counters = CollectorRegistry()
    generated = Counter("vllm:generation_tokens", "-", registry=counters)
    facts = model_facts(save_model("llama", tmp_path))
    sleep = [sys.executable, "-c", "input()"]
    workers = [subprocess.Popen(sleep, stdin=subprocess.PIPE)]
    attempts = 0

    def resident() -> dict[str, int]:
        nonlocal attempts
        attempts += 1
        return {"worker_0": psutil.Process(workers[-1].pid).memory_info().rss}

    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(f"svdserve_{name}", {"model_name": "m", **labels})

    async def until(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0)

    async def scenario() -> None:
        watched = metrics.ServerMetrics("m", facts, resident, [], counters)
        task = asyncio.create_task(watched.watch(0.0))
        await until(lambda: value("process_resident_bytes", process="worker_0"))
        workers[-1].communicate()
        tried = attempts
        # A wait that doubles without bound is no floating point number after 1,024 failures.
        await until(lambda: attempts > tried + 1100 or task.done())
        generated.inc(1000)
        await until(lambda: value("generation_tokens_per_second") or task.done())
        workers.append(subprocess.Popen(sleep, stdin=subprocess.PIPE))

        def follows() -> bool:
            known = psutil.Process(workers[-1].pid).memory_info().rss
            shown = value("process_resident_bytes", process="worker_0")
            return shown == pytest.approx(known, rel=0.1)

        await until(lambda: follows() or task.done())
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    try:
        asyncio.run(scenario())
    finally:
        for worker in workers:
            worker.communicate()
        metrics.logger.removeHandler(caplog.handler)
    # One for more than a thousand failures; the root's handler may have seen the same one too.
    (record,) = {id(r): r for r in caplog.records if r.name.endswith("metrics")}.values()
    assert record.exc_info
    assert record.exc_info[0] is psutil.NoSuchProcess


# One API server with vLLM's two counters; it lives until the test has read the files.
SERVER = """
import sys
from pathlib import Path
from prometheus_client import Counter
from svdserve.server.metrics import ServerMetrics, model_facts
rank, directory = int(sys.argv[1]), Path(sys.argv[2])
labels = ("model_name", "engine")
generation = Counter("vllm:generation_tokens", "-", labels).labels("m", "0")
prompt = Counter("vllm:prompt_tokens", "-", labels).labels("m", "0")
roles = {f"api_server_{rank}": 1000 + rank, "worker_0": 5000}
metrics = ServerMetrics("m", model_facts(directory), lambda: roles, [])
metrics.update(0)
generation.inc(100 * (rank + 1))
prompt.inc(10)
metrics.update(10)
print("ready", flush=True)
sys.stdin.read()
"""


def test_several_api_servers_merge(tmp_path: Path) -> None:
    """Rates add up; facts do not; every server has its own process entry."""
    directory = save_model("llama", tmp_path / "model")
    shared = tmp_path / "prometheus"
    shared.mkdir()
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(shared)}
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", SERVER, str(rank), str(directory)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert [server.stdout.readline() for server in servers if server.stdout] == ["ready\n"] * 2
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=str(shared))  # type: ignore[no-untyped-call]
        text = generate_latest(registry).decode()
    finally:
        for server in servers:
            server.communicate("")
    values = {
        (sample.name, sample.labels.get("process") or sample.labels.get("kind")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["svdserve_generation_tokens_per_second", None] == 30
    assert values["svdserve_prompt_tokens_per_second", None] == 2
    assert values["svdserve_keep_ratio", None] == 1
    assert 0 < values["svdserve_memory_available_bytes", None] <= psutil.virtual_memory().total
    assert values["svdserve_weights_bytes", "dense"] == file_bytes(directory)["dense"]
    resident = {role: v for (name, role), v in values.items() if "resident" in name}
    assert resident == {"api_server_0": 1000, "api_server_1": 1001, "worker_0": 5000}


ROOT = Path(__file__).parents[2]
NAME = "pico"
ONLY_ON_ACCELERATORS = {"svdserve_device_memory_bytes"}
DOCUMENTED_ROW = re.compile(r"\| `((?:svdserve_|vllm:)\w+)` \| (\w+) \| [^|]+ \|([^|]*)\| .+ \|")


@dataclass(frozen=True)
class Scaled:
    """A server of several processes after some traffic."""

    url: str
    pid: int
    dense: Path
    factored: Path
    requests: int
    completion_tokens: int
    prompt_tokens: int

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            return answer.read().decode()  # type: ignore[no-any-return]

    def samples(self, name: str) -> list[Sample]:
        families = text_string_to_metric_families(self.metrics())
        return [s for family in families for s in family.samples if s.name == name]

    def by(self, label: str, name: str, **others: str) -> dict[str, float]:
        """Values by one label, of the samples that have these other labels."""
        found = [s for s in self.samples(name) if others.items() <= s.labels.items()]
        return {sample.labels[label]: sample.value for sample in found}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scaled]:
    folder = tmp_path_factory.mktemp("scaled")
    dense = save_model("llama", folder / "dense")
    factored = write_checkpoint(dense, folder / "small", layout="interpolative", shared=True)
    flags = ["--served-model-name", NAME, "--enforce-eager", "--dtype", "float32"]
    flags += ["--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20)]
    flags += ["--api-server-count", "2", "--tensor-parallel-size", "2"]
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        with running(factored, "127.0.0.1", free_port(), folder / "log", flags) as server:
            # Every request has a connection of its own, which either API server may take.
            lengths = [(5 + i, 3 + i) for i in range(12)]
            for prompt, tokens in lengths:
                complete(server.url, NAME, list(range(4, 4 + prompt)), tokens)
            prompts, completions = (sum(counts) for counts in zip(*lengths, strict=True))
            yield Scaled(
                server.url, server.pid, dense, factored, len(lengths), completions, prompts
            )


@pytest.mark.vllm
def test_the_documented_metrics_are_those_of_the_server(scaled: Scaled) -> None:
    """Names, types and labels of docs/monitoring.md, in both directions for svdserve's own."""
    documented = {}
    for line in (ROOT / "docs/monitoring.md").read_text().splitlines():
        if match := DOCUMENTED_ROW.fullmatch(line):
            name, kind, labels = match.groups()
            documented[name] = (kind, {"model_name", *re.findall(r"`(\w+)`", labels)})
    exposed = {}
    for family in text_string_to_metric_families(scaled.metrics()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        exposed[name] = (family.type, labels)
    assert len(documented) > 20
    present = {name: row for name, row in documented.items() if name not in ONLY_ON_ACCELERATORS}
    assert present == {name: exposed.get(name) for name in present}
    ours = {name for name in exposed if name.startswith("svdserve_")}
    assert ours == {name for name in present if name.startswith("svdserve_")}


@pytest.mark.vllm
def test_every_metric_that_the_dashboard_reads_exists(scaled: Scaled) -> None:
    static = ROOT / "server/svdserve/server/http/dashboard/static"
    code = "".join(file.read_text() for file in static.glob("*.js"))
    named = set(re.findall(r"\"((?:svdserve_|vllm:)\w+)\"", code)) - ONLY_ON_ACCELERATORS
    families = {family.name for family in text_string_to_metric_families(scaled.metrics())}
    assert len(named) > 10
    assert named <= families


@pytest.mark.vllm
def test_either_api_server_tells_all_that_both_have_answered(scaled: Scaled) -> None:
    expected = {
        "vllm:generation_tokens_total": scaled.completion_tokens,
        "vllm:prompt_tokens_total": scaled.prompt_tokens,
        "vllm:time_to_first_token_seconds_count": scaled.requests,
        "vllm:e2e_request_latency_seconds_count": scaled.requests,
        "vllm:inter_token_latency_seconds_count": scaled.completion_tokens - scaled.requests,
        "svdserve_keep_ratio": model_facts(scaled.factored).keep_ratio,
    }
    for _ in range(4):
        assert {name: [s.value for s in scaled.samples(name)] for name in expected} == {
            name: [value] for name, value in expected.items()
        }


@pytest.mark.vllm
def test_every_process_of_several_api_servers_and_ranks_has_its_memory(scaled: Scaled) -> None:
    resident = scaled.by("process", "svdserve_process_resident_bytes")
    workers = {"worker_0", "worker_1"}
    assert set(resident) == {"launcher", "api_server_0", "api_server_1", "engine_core", *workers}
    root = psutil.Process(scaled.pid)
    assert resident["launcher"] == pytest.approx(root.memory_info().rss, rel=0.05)
    tree = [root, *root.children(recursive=True)]
    # The rest are Python's resource trackers.
    assert sum(resident.values()) == pytest.approx(
        sum(process.memory_info().rss for process in tree), rel=0.05
    )


@pytest.mark.vllm
def test_ranks_share_the_linears_and_repeat_the_norms(scaled: Scaled) -> None:
    equivalent = scaled.by("worker", "svdserve_worker_dense_equivalent_bytes")
    assert set(equivalent) == {"0", "1"}
    weights = load_file(scaled.dense / "model.safetensors")
    norms = sum(tensor.nbytes for name, tensor in weights.items() if "norm" in name)
    assert norms > 0
    assert sum(equivalent.values()) == file_bytes(scaled.dense)["dense"] + norms
    stored = file_bytes(scaled.factored)
    held = {
        kind: sum(scaled.by("worker", "svdserve_worker_weights_bytes", kind=kind).values())
        for kind in stored
    }
    assert held["dense"] == stored["dense"] + norms
    assert stored["lowrank"] < held["lowrank"] < 2 * stored["lowrank"]  # One factor is repeated.


@pytest.mark.vllm
def test_the_kv_cache_is_what_vllm_says_it_holds(scaled: Scaled) -> None:
    """Two tensors of 32-bit numbers for each of 3 layers; a rank has one of two heads, of 32."""
    (info,) = scaled.samples("vllm:cache_config_info")
    blocks, block = (int(info.labels[label]) for label in ("num_gpu_blocks", "block_size"))
    expected = blocks * block * 2 * 3 * 1 * 32 * 4
    assert scaled.by("worker", "svdserve_kv_cache_bytes") == {"0": expected, "1": expected}
    assert 0.9 * (64 << 20) < expected <= 64 << 20


@pytest.mark.vllm
def test_the_load_time_is_told_once(scaled: Scaled) -> None:
    (load,) = scaled.samples("svdserve_model_load_seconds")
    assert 0 < load.value < 600
