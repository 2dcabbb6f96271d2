"""A forked run of `svdserve` is what a fresh interpreter's is, for anyone outside."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import save_model
from zygote import listening

FRESH = [str(Path(sys.executable).with_name("svdserve"))]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(tmp_path_factory.mktemp("program")) as program:
        yield str(program)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_model("llama", tmp_path_factory.mktemp("model") / "dense")
    (model.parent / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(9000)))
    return model


@pytest.mark.parametrize(
    "words",
    [["--version"], ["inspect", "nowhere"], ["methods"], ["compress", "--help"], []],
    ids=str,
)
def test_streams_and_exit_code_are_the_same(words: list[str], program: str, tmp_path: Path) -> None:
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    found = [
        subprocess.run([*command, *words], capture_output=True, cwd=tmp_path, env=environment)
        for command in ([program], FRESH)
    ]
    forked, fresh = ((done.returncode, done.stdout, done.stderr) for done in found)
    assert forked == fresh


def test_checkpoints_are_the_same(program: str, model: Path, tmp_path: Path) -> None:
    options = ["--tokens", "256", "--seq-len", "32", "--no-progress"]
    options += ["--calibration", str(model.parent / "text.txt")]
    made = []
    for name, command in (("forked", [program]), ("fresh", FRESH)):
        words = [*command, "compress", str(model), "--out", name, *options]
        subprocess.run(words, cwd=tmp_path, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def _started(program: str, model: Path, folder: Path) -> "subprocess.Popen[str]":
    """A job in the middle of its calibration."""
    words = ["compress", str(model), "--out", "out", "--tokens", "200000", "--seq-len", "256"]
    job = subprocess.Popen([program, *words], cwd=folder, text=True, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not (folder / "out.partial").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    return job


def test_a_signal_reaches_the_run(program: str, model: Path, tmp_path: Path) -> None:
    job = _started(program, model, tmp_path)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1].startswith("interrupted: ")


def test_the_run_ends_with_whom_it_was_for(program: str, model: Path, tmp_path: Path) -> None:
    job = _started(program, model, tmp_path)
    job.kill()
    assert job.stderr
    job.stderr.read()  # to its end: nobody holds the stream any more
    assert job.wait() == -signal.SIGKILL
