"""`svdserve bench --kernels` on layers that take no time; speed itself is not tested."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from svdserve.bench import kernels as bench
from svdserve.compression.format.layouts import INTERPOLATIVE
from svdserve.compression.system.errors import UserError
from svdserve.kernels import cpu
from svdserve.kernels.registry import Request, choose


def test_compares_dense_the_two_products_and_every_implementation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "_BEYOND_CACHE", 20_000)
    monkeypatch.setattr(bench, "_ROUND_SECONDS", 0)
    layer = bench.Layer(name="o_proj", outputs=48, inputs=64)
    for dtype in ("float32", "bfloat16"):
        options = bench.KernelOptions(
            layers=(layer,), keeps=(0.8, 0.5), rows=(1, 3), pairs=3, dtype=dtype
        )
        found = bench.run_kernel_bench(options)
        assert [(one.keep, one.rows) for one in found.results] == [
            (0.8, 1), (0.8, 3), (0.5, 1), (0.5, 3),
        ]  # fmt: skip
        for one in found.results:
            assert one.rank == INTERPOLATIVE.rank_for_keep(48, 64, one.keep)
            columns = (64 - one.rank, one.rank)
            request = Request("cpu", getattr(torch, dtype), columns, prepared=True)
            assert one.op == choose(request).name
            assert {"dense", "two products", "torch", one.op} <= set(one.seconds)
            assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in one.seconds.values())
            op, products = one.seconds[one.op], one.seconds["two products"]
            ratios = [a / b for a, b in zip(op, products, strict=True)]
            assert one.over_products == statistics.median(ratios)
        bench.print_kernel_bench(found)
        assert found.machine.cores > 0


@pytest.mark.skipif(bool(cpu.unsupported()), reason=str(cpu.unsupported()))
def test_int8_is_compared_with_the_fastest_dense_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_BEYOND_CACHE", 20_000)
    monkeypatch.setattr(bench, "_ROUND_SECONDS", 0)
    layer = bench.Layer(name="o_proj", outputs=64, inputs=64)
    options = bench.KernelOptions(
        layers=(layer,), keeps=(0.5,), rows=(1, 3), pairs=3, weights="int8"
    )
    monkeypatch.setenv("SVDSERVE_KERNEL", "cpu")
    for one in bench.run_kernel_bench(options).results:
        assert one.op == "cpu"
        assert set(one.seconds) == {"dense", "dense, our kernel", "two products", "cpu"}
        medians = {name: statistics.median(times) for name, times in one.seconds.items()}
        assert medians[one.fastest_dense] == min(medians["dense"], medians["dense, our kernel"])
    with pytest.raises(UserError, match="--weights int8 is measured on cpu in bfloat16"):
        bench.run_kernel_bench(options.model_copy(update={"dtype": "float32"}))


def test_layers_of_a_model_are_those_that_vllm_merges(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="intermediate_size"):
        bench.layers_of(tmp_path)
    file.write_text(json.dumps(config | {"intermediate_size": 160}))
    assert [(one.outputs, one.inputs) for one in bench.layers_of(tmp_path)] == [
        (128, 64), (64, 64), (320, 64), (64, 160),
    ]  # fmt: skip


def test_what_stays_dense_cannot_be_measured() -> None:
    with pytest.raises(UserError, match="keep 1; it stays dense"):
        bench.run_kernel_bench(bench.KernelOptions(keeps=(1.0,), rows=(1,)))


def test_an_override_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDSERVE_KERNEL", "nope")
    with pytest.raises(UserError, match="cannot run as 'nope'"):
        bench.run_kernel_bench(bench.KernelOptions(rows=(1,)))
