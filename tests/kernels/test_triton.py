"""The Triton kernels without a GPU: interpreted, against the definition, and compiled for GPUs."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from lowrank_cases import Shape, assert_equals_definition
from triton_run import CONFIGURATIONS, Interpreted, Job, run

pytest.importorskip("triton", reason="Triton cannot be imported")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    (Shape(1, 2, 1),),
    (Shape(17, 33, 15),),
    (Shape(40, 40, 40),),  # rank full: no channel is left for factor_in
    (Shape(100, 290, 147),),
    (Shape(17, 33, 15, pivots=False),),
    (Shape(144, 160, 48, pivots=False),),
    (Shape(48, 96, 37), Shape(16, 96, 16), Shape(16, 96, 5)),  # q, k, v, separate
    (Shape(20, 64, 9), Shape(33, 64, 40, pivots=False)),
]
# Of every configuration, a number of rows that fills its block and one that does not.
ROWS = (0, 1, 7, 16, 33, 64, 130)
# Every pair of a shape, a number of rows and a dtype.
JOBS = [
    Job(shapes, rows, DTYPES[(i + j) % 3], bias=rows != 7)
    for i, shapes in enumerate(SHAPES)
    for j, rows in enumerate(ROWS)
]
JOBS += [
    Job((Shape(24, 48, 16, pivots),), rows, dtype, prepared=False)
    for pivots in (True, False)
    for rows in (3, 70)
    for dtype in DTYPES
]
# And of a configuration with these; the dtypes are two.
FEW = (1, 7, 16)
JOBS += [
    Job(shapes, FEW[(i + j) % 3], DTYPES[::2][(i // 3 + j) % 2], bias=i % 2 == 0, config=config)
    for i, shapes in enumerate(SHAPES)
    for j, config in enumerate(CONFIGURATIONS)
]
JOBS += [
    Job(shapes, rows, torch.bfloat16, config=config, in_order=True)
    for shapes in SHAPES[1:4]
    for rows in (1, 16)
    for config in CONFIGURATIONS
]
JOBS.append(Job((Shape(20, 64, 9), Shape(33, 64, 12)), 5, torch.float32, compiled=True))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Interpreted:
    return run(tmp_path_factory.mktemp("interpreted"), JOBS)


@pytest.mark.parametrize("index", range(len(JOBS)), ids=lambda index: str(JOBS[index]))
def test_interpreted_equals_the_definition(index: int, interpreted: Interpreted) -> None:
    job = JOBS[index]
    x, bias = job.arguments()
    assert_equals_definition(interpreted.first[index], x, job.parts(), bias)
    # A single launch and a split shrink leave their counters as they found them.
    assert torch.equal(interpreted.first[index], interpreted.second[index])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("compiled") / "kernels.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "svdserve.kernels.triton.aot", "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.mark.exhaustive
def test_every_configuration_compiles_without_spills(compiled: dict[str, Any]) -> None:
    for kernel in compiled["kernels"]:
        assert kernel["spills"] == kernel["stack_bytes"] == 0, kernel
        limit = compiled["shared_limit_bytes"][kernel["target"]]
        assert 0 < kernel["shared_bytes"] <= limit, kernel
        assert kernel["registers"] <= 255, kernel


@pytest.mark.exhaustive
def test_weights_are_loaded_128_bits_at_a_time_and_multiplied_by_tensor_cores(
    compiled: dict[str, Any],
) -> None:
    for kernel in compiled["kernels"]:
        assert kernel["wide_loads"] > 0, kernel
        names = " ".join(kernel["tensor_core"])
        expected = {
            "sm_80": "HMMA.16816",
            "sm_90": "HGMMA",
            "sm_100": "UTCHMMA",
        }  # mma, wgmma, tcgen05
        if kernel["fixed"]["BT"] == 16:  # wgmma and tcgen05 take 64 rows or more
            expected = dict.fromkeys(expected, "HMMA.16816")
        expected["gfx942"] = "v_mfma_f32"
        if kernel["dtype"] != "float32":
            assert expected[kernel["target"]] in names, kernel
        elif kernel["target"] != "gfx942":  # whose matrix cores multiply float32 without rounding
            assert names == "", kernel


@pytest.mark.exhaustive
def test_every_launch_is_a_compiled_configuration(
    compiled: dict[str, Any], interpreted: Interpreted
) -> None:
    launched = {_compiled_of(name, json.loads(fixed)) for name, fixed in interpreted.launches}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        mine = [kernel for kernel in compiled["kernels"] if kernel["target"] == target]
        assert {_compiled_of(kernel["kernel"], kernel["fixed"]) for kernel in mine} == launched


def _compiled_of(kernel: str, fixed: dict[str, Any]) -> str:
    """What a launch compiles; but for the number of stages, of which AMD has its own."""
    return json.dumps(
        [kernel, {k: v for k, v in fixed.items() if k != "num_stages"}], sort_keys=True
    )
