"""A package of somebody else adds a method, an allocator, a layout and a codec, one file each.

It is installed into a folder of its own, and svdserve finds it by its entry points. A recipe names
its parts, and compression, evaluation, transformers and vLLM work with what they wrote.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import random_tokens, save_model
from vllm_run import run

HERE = Path(__file__).parent
PARTS = {"method", "allocator", "layout", "codec"}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the package."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(target), str(HERE / "third_party")]
    subprocess.run(command, check=True, timeout=300)
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, (str(target), before)))
    return os.environ | ENVIRONMENT | {"PYTHONPATH": path}


def svdserve(environment: dict[str, str], *words: object) -> str:
    command = [sys.executable, "-m", "svdserve.cli.main", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def small(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of all four parts, beside the dense model and a text."""
    root = tmp_path_factory.mktemp("third")
    save_model("llama", root / "dense")
    (root / "text.txt").write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000)))
    svdserve(
        environment,
        *("compress", root / "dense", "--out", root / "small", "--keep", "0.8"),
        *("--method", "example-rms", "--set", "method.power=0.5"),
        *("--allocator", "example-deeper", "--set", "allocator.less=0.1"),
        *("--layout", "example-scaled", "--weights", "example-int16"),
        *("--calibration", root / "text.txt", "--tokens", "256", "--seq-len", "64"),
    )
    return root / "small"


def test_each_part_is_one_file() -> None:
    files = {path.stem for path in (HERE / "third_party" / "svdserve_example").glob("*.py")}
    assert files == PARTS | {"__init__"}


def test_the_checkpoint_names_them(small: Path) -> None:
    block = json.loads((small / "config.json").read_text())["quantization_config"]
    modules = block["modules"].values()
    assert {module["layout"] for module in modules} == {"example-scaled"}
    assert {module["codec"] for module in modules} == {"example-int16"}
    assert {linear["codec"] for linear in block["linears"].values()} <= {"example-int16"}
    recipe = block["recipe"]
    assert (recipe["method"], recipe["parameters"]) == ("example-rms", {"power": 0.5})
    assert (recipe["allocator"], recipe["allocator_parameters"]) == (
        "example-deeper",
        {"less": 0.1},
    )


def test_svdserve_evaluates_and_inspects_it(small: Path, environment: dict[str, str]) -> None:
    text, dense = small.parent / "text.txt", small.parent / "dense"
    results = small.parent / "results.json"
    options = ("--text", text, "--seq-len", "64", "--json", results)
    svdserve(environment, "eval", dense, small, *options)
    losses = [found["mean_loss"] for found in json.loads(results.read_text())]
    assert 0 < abs(losses[1] - losses[0]) < 1
    rows = json.loads(svdserve(environment, "inspect", small, "--json"))["modules"]
    assert {row["dtype"] for row in rows} == {"int16"}


def test_without_the_package_one_line_says_what_is_missing(small: Path) -> None:
    command = [sys.executable, "-m", "svdserve.cli.main", "inspect", str(small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "unknown codec 'example-int16'; allowed: float, int8" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.vllm
def test_vllm_serves_what_transformers_computes(
    small: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (5, 30)]
    program = (
        "import json, sys, torch, svdserve.compression\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "found = [model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).tolist()"
        " for ids in json.loads(sys.argv[2])]\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-c", program, str(small), json.dumps(prompts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    path = environment["PYTHONPATH"]
    (served,) = run(tmp_path, [{"model": str(small)}], prompts, PYTHONPATH=path)
    assert served.error == ""
    # The first rows are of the prompt's own tokens.
    rows = zip(served.logprobs, prompts, strict=True)
    got = torch.stack([logprobs[len(prompt) - 1] for logprobs, prompt in rows])
    assert float((got - expected).abs().max()) < 0.02
