"""The served benchmark on pico models: what is sent, what is kept, how ratios are formed."""

import json
import statistics
from pathlib import Path

import psutil
import pytest

from checkpoints import write_checkpoint
from models import save_model
from svdserve.bench.report import markdown, plot
from svdserve.bench.served import (
    THROUGHPUT,
    WORKLOADS,
    LoadOptions,
    LoadResult,
    Target,
    run_load,
    targets_of,
)
from svdserve.compression.system.errors import UserError
from svdserve.server.cpu_install import serves_on_cpu

OPTIONS = LoadOptions(
    pairs=2,
    starts=2,
    concurrency=(1, 3),
    requests=2,
    max_len=96,
    dtype="float32",
    kv_cache_bytes=16 << 20,
)

STOCK = ("--load-format", "auto")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> LoadResult:
    folder = tmp_path_factory.mktemp("load")
    dense = save_model("llama", folder / "dense")
    low = write_checkpoint(dense, folder / "low", layout="interpolative", shared=True)
    return run_load([Target("dense", dense, flags=STOCK), Target("low", low)], OPTIONS)


@pytest.mark.exhaustive
@pytest.mark.vllm
def test_every_round_of_every_server_is_measured(result: LoadResult):
    wanted = {(w, c, n) for w in WORKLOADS for c in (1, 3) for n in (1, 2)}
    for server in result.servers:
        assert {(x.workload, x.concurrency, x.round) for x in server.loads} == wanted
        assert all(value > 0 for load in server.loads for value in load.figures.values())
        assert len(server.first_token_seconds) == OPTIONS.starts
        pairs = zip(server.ready_seconds, server.first_token_seconds, strict=True)
        assert all(0 < ready < first for ready, first in pairs)
        assert server.peak_resident_bytes > server.stored_bytes
        for load in server.loads:
            figures = load.figures
            assert figures["median_ttft_ms"] <= figures["p99_ttft_ms"]


@pytest.mark.exhaustive
@pytest.mark.vllm
def test_ratios_pair_the_rounds(result: LoadResult):
    dense, low = result.servers
    shown = markdown(result)
    for ratio in result.ratios:
        if ratio.workload == "start":
            ours, theirs = low.first_token_seconds, dense.first_token_seconds
        else:
            key = ratio.workload, ratio.concurrency
            ours, theirs = (
                [
                    x.figures[ratio.figure]
                    for x in server.loads
                    if (x.workload, x.concurrency) == key
                ]
                for server in (low, dense)
            )
        rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
        assert ratio.median == pytest.approx(statistics.median(rounds))
        assert f"{ratio.median:.2f}" in shown
    assert LoadResult.model_validate(json.loads(result.model_dump_json())) == result


@pytest.mark.exhaustive
@pytest.mark.vllm
def test_the_report_names_what_the_freed_memory_buys(result: LoadResult, tmp_path: Path):
    dense, low = result.servers
    tokens = (dense.stored_bytes - low.stored_bytes) // low.kv_token_bytes
    assert result.kv_tokens_gained(low) == tokens > 0
    assert f"{tokens:,}" in markdown(result)
    plot(result, tmp_path / "speed.svg")
    assert (tmp_path / "speed.svg").read_text().count("<svg") == 1
    assert THROUGHPUT in {ratio.figure for ratio in result.ratios}


@pytest.mark.exhaustive
@pytest.mark.vllm
def test_no_server_is_left(result: LoadResult):
    assert result.servers
    left = psutil.Process().children(recursive=True)
    assert not [child for child in left if "svdserve.cli.main" in " ".join(child.cmdline())]


def test_mixed_lengths_are_those_of_sharegpt():
    options = LoadOptions(max_len=1 << 20, requests=20_000)
    lengths = options.lengths("mixed", 1, seed=1)
    prompts, outputs = zip(*lengths, strict=True)
    assert statistics.mean(prompts) == pytest.approx(161, rel=0.05)
    assert statistics.mean(outputs) == pytest.approx(338, rel=0.05)
    assert lengths == options.lengths("mixed", 1, seed=1) != options.lengths("mixed", 1, seed=2)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_request_fits_the_context(workload: str):
    lengths = OPTIONS.lengths(workload, 32, seed=0)
    assert len(lengths) == 64
    assert all(prompt + output <= OPTIONS.max_len for prompt, output in lengths)


def test_the_dense_model_is_served_twice(tmp_path: Path):
    """As vLLM has it, and as the fair baseline where there is one."""
    dense, low = tmp_path / "dense", tmp_path / "low"
    stock, *fair, last = targets_of(dense, [low], "bfloat16")
    assert (stock.name, stock.flags) == ("dense", ("--load-format", "auto"))
    assert (last.name, last.directory, last.flags) == ("low", low, stock.flags)
    named = ["dense, our kernels"] if serves_on_cpu() else []
    assert [target.name for target in fair] == named
    assert all(target.directory == dense for target in fair)
    assert all(target.flags == ("--load-format", "svdserve") for target in fair)
    assert len(targets_of(dense, [low], "float32")) == 2


def test_a_model_without_tokenizer_is_refused(tmp_path: Path):
    model = save_model("llama", tmp_path / "model")
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        run_load([Target("model", model)], OPTIONS)
