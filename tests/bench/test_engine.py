"""The benchmark on pico models: its arithmetic, its order, its refusals; no figure is asserted."""

import json
from pathlib import Path

import psutil
import pytest

from checkpoints import write_checkpoint
from files import file_bytes
from models import save_model
from svdserve.bench.engine import (
    BenchOptions,
    BenchResult,
    plot_bench,
    print_bench,
    run_bench,
    start_engines,
)
from svdserve.bench.worker import TOTAL
from svdserve.compression.system.errors import UserError
from svdserve.server.cpu_install import serves_on_cpu

SMALL = {"prompt_len": 8, "output_len": 8, "prefill_len": 32, "kv_cache_bytes": 16 << 20}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> BenchOptions:
    folder = tmp_path_factory.mktemp("bench")
    dense = save_model("llama", folder / "dense")
    low = write_checkpoint(dense, folder / "low", layout="interpolative", shared=True)
    return BenchOptions(dense=dense, models=(low,), pairs=2, starts=2, batch_sizes=(1, 4), **SMALL)


@pytest.fixture(scope="module")
def result(options: BenchOptions) -> BenchResult:
    return run_bench(options)


@pytest.mark.exhaustive
@pytest.mark.vllm
def test_every_workload_of_every_model_is_measured(result: BenchResult) -> None:
    assert [model.name for model in result.models] == ["dense", "low"]
    assert [model.name for model in result.compared[:-1]] == fair_names()
    for model in (result.models[0], *result.compared):
        assert list(model.tokens_per_second) == ["decode_1", "decode_4", "prefill_32"]
        assert all(len(speeds) == 4 for speeds in model.tokens_per_second.values())
        assert all(speed > 0 for speeds in model.tokens_per_second.values() for speed in speeds)


def fair_names() -> list[str]:
    """Of the fair baseline, where there is one."""
    return ["dense, our kernels"] if serves_on_cpu() else []


@pytest.mark.exhaustive
@pytest.mark.vllm
def test_sizes_are_those_of_the_files(result: BenchResult) -> None:
    for model in result.models:
        assert model.stored_bytes == sum(file_bytes(Path(model.directory)).values())
        assert model.stored_bytes < model.unique_bytes <= model.resident_bytes
        assert 0 < (model.load_seconds or 0) < model.start_seconds or model.name == "dense"


@pytest.mark.exhaustive
@pytest.mark.vllm
def test_ratios_pair_the_rounds(result: BenchResult) -> None:
    written = json.loads(result.model_dump_json())
    dense, low = written["models"]
    assert len(written["ratios"]) == 3
    assert len(written["fair_ratios"]) == 3 * len(fair_names())
    own = [(low, ratio) for ratio in written["ratios"]]
    own += [(written["fair"], ratio) for ratio in written["fair_ratios"]]
    for model, ratio in own:
        pairs = zip(
            model["tokens_per_second"][ratio["workload"]],
            dense["tokens_per_second"][ratio["workload"]],
            strict=True,
        )
        rounds = sorted(fast / slow for fast, slow in pairs)
        expected = [rounds[0], (rounds[1] + rounds[2]) / 2, rounds[3]]
        assert [ratio["lowest"], ratio["median"], ratio["highest"]] == pytest.approx(expected)
    assert BenchResult.model_validate(written) == result
    del written["fair"], dense["load_format"], low["load_format"]  # as older files are
    assert BenchResult.model_validate(written).compared == result.models[1:]


@pytest.mark.exhaustive
@pytest.mark.vllm
def test_the_table_shows_each_ratio(
    result: BenchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_bench(result)
    plot_bench(result, tmp_path / "speed.svg")
    assert "decode 4" in (tmp_path / "speed.svg").read_text()
    shown = capsys.readouterr().out
    for ratio in (*result.ratios, *result.fair_ratios):
        assert f"{ratio.median:.2f}" in shown
    assert result.machine.processor in shown


@pytest.mark.exhaustive
@pytest.mark.vllm
def test_no_engine_is_left(result: BenchResult) -> None:
    assert result.models
    assert not [
        child
        for child in psutil.Process().children(recursive=True)
        if "svdserve.bench.worker" in child.cmdline()
    ]


def test_prompts_beyond_the_context_are_refused(options: BenchOptions) -> None:
    long = options.model_copy(update={"prefill_len": 256})
    with pytest.raises(UserError, match="holds 256 tokens, the benchmark needs 257"):
        run_bench(long)


def test_a_missing_model_is_refused(options: BenchOptions, tmp_path: Path) -> None:
    absent = options.model_copy(update={"models": (tmp_path / "absent",)})
    with pytest.raises(UserError, match="no such directory"):
        run_bench(absent)


@pytest.mark.vllm
def test_an_engine_that_can_not_start_tells_why(options: BenchOptions) -> None:
    starved = options.model_copy(update={"kv_cache_bytes": 1})
    with pytest.raises(RuntimeError, match=r"(?s)the engine of .*dense died:.*cache blocks"):
        run_bench(starved)


@pytest.mark.exhaustive
@pytest.mark.vllm
def test_the_profile_divides_the_measured_time(options: BenchOptions) -> None:
    """The parts that the profile of a step is made of are all of its time, and none is negative.

    The engines are in their order though the last one was loaded first.
    """
    with start_engines(options, last_first=True) as engines:
        expected = [contender.directory for contender in options.contenders]
        assert [Path(engine.directory) for engine in engines] == expected
        engine = engines[-1]
        lengths = {"prompt_len": 8, "output_len": 8, "batch": 4, "seed": 0}
        engine.call({"method": "decode", **lengths})
        recorded = engine.call({"method": "profile", "recorded": "decode", **lengths})
    total = recorded.pop(TOTAL)
    assert 0 < sum(recorded.values()) <= 1.05 * total
    assert recorded["_C::cpu_attention_with_kv_cache"] > 0
