"""The gauges: facts against the files, rates against counters, several processes against sums."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from prometheus_client.parser import text_string_to_metric_families

from checkpoints import write_checkpoint
from files import file_bytes
from models import save_model
from svdserve.compression.errors import UserError
from svdserve.server.metrics import TokenRate, model_facts, resident_bytes


def test_facts_agree_with_the_files(tmp_path: Path) -> None:
    dense = save_model("qwen2", tmp_path / "dense")
    target = write_checkpoint(dense, tmp_path / "low", layout="pair", shared=False)
    facts, stored, all_dense = model_facts(target), file_bytes(target), file_bytes(dense)
    assert (facts.lowrank_bytes, facts.dense_bytes) == (stored["lowrank"], stored["dense"])
    assert 0 < facts.lowrank_bytes < all_dense["dense"]
    assert facts.dense_equivalent_bytes == all_dense["dense"]
    assert (facts.layout, facts.format_version, facts.base_model) == ("pair", 1, "dense")


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
