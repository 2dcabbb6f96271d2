"""Faults while a job runs: kill -9, signals, a full disk, damaged input. Then it resumes."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kills import contents, kill_and_resume
from models import save_model
from svdserve.compression.format.integrity import SUMS_FILE, verify
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.system.errors import UserError
from zygote import Ended, Zygote, zygote

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(6000))
RECIPE = "tokens: 512\nseq_len: 32\nrefinement:\n  epochs: 1\n  evaluations: 3\n"


@pytest.fixture(scope="module")
def svdserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote(tmp_path_factory.mktemp("zygote")) as started:
        yield started


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, svdserve: Zygote) -> Path:
    """A dense model, a recipe that trains too, and a checkpoint to refine."""
    root = tmp_path_factory.mktemp("faults")
    (root / "text.txt").write_text(TEXT)
    (root / "recipe.yaml").write_text(RECIPE + f"calibration: {root / 'text.txt'}\n")
    save_model("llama", root / "dense", dtype=torch.bfloat16)
    plain = ["--method", "svd", "--calibration", root / "text.txt", "--tokens", "512"]
    options = [*plain, "--seq-len", "32", "--out", root / "small"]
    ended = svdserve.run(["compress", root / "dense", *options])
    assert ended.code == 0, ended.errors
    return root


def commands(root: Path) -> dict[str, list[object]]:
    text = ["--calibration", root / "text.txt"]
    return {
        "compress": ["compress", root / "dense", "--recipe", root / "recipe.yaml"],
        "refine": ["refine", root / "dense", root / "small", *text, "--evaluations", "4"],
    }


@pytest.fixture(scope="module")
def expected(root: Path, svdserve: Zygote) -> dict[str, bytes]:
    """What an uninterrupted compression writes."""
    ended = svdserve.run([*commands(root)["compress"], "--out", root / "expected"])
    assert ended.code == 0, ended.errors
    return contents(root / "expected")


@pytest.mark.parametrize(("name", "kills"), [("compress", 6), ("refine", 2)])
def test_kills_at_random_moments(
    name: str, kills: int, root: Path, svdserve: Zygote, tmp_path: Path
) -> None:
    """benchmarks/reliability/reliability_kill.py does more of them."""
    record = kill_and_resume(svdserve, commands(root)[name], tmp_path / "out", kills, seed=1)
    assert len(record["kills"]) == kills
    assert SUMS_FILE in record["files"]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_kills_in_the_last_steps(
    root: Path, svdserve: Zygote, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Before each of the renames that put the output into place, and while the rest is removed."""
    out = tmp_path / "out"
    arguments = [*commands(root)["compress"], "--out", out, "--resume"]
    changes = svdserve.run(arguments).changes
    renames = [number for number, kind in enumerate(changes, 1) if kind == "r"]
    states = []
    for change in (*renames[-3:], renames[-1] + 1, len(changes)):
        shutil.rmtree(out)
        assert svdserve.run(arguments, kill_at=change).code == -signal.SIGKILL
        states.append((out.exists(), out.with_name("out.partial").exists()))
        if out.exists():
            assert contents(out) == expected
        ended = svdserve.run(arguments)
        assert ended.code == 0, ended.errors
        assert contents(out) == expected
        assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert states == [(False, True)] * 2 + [(True, True)] + [(True, False)] * 2


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_signals_end_with_one_line_that_says_how_to_go_on(
    number: int,
    code: int,
    root: Path,
    svdserve: Zygote,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = [*commands(root)["compress"], "--out", out]
    run = svdserve.start(arguments)
    wait_for(partial / "block-00000.safetensors")
    run.kill(number)
    ended = run.wait()
    assert ended.code == code
    last = ended.errors.splitlines()[-1]
    assert last == (
        f"interrupted: {partial} keeps what is finished, and the same command with --resume goes on"
    )
    assert "Traceback" not in ended.errors
    assert not out.exists()
    assert svdserve.run([*arguments, "--resume"]).code == 0
    assert contents(out) == expected


def wait_for(path: Path) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(root: Path, svdserve: Zygote, expected: dict[str, bytes], disk: Path) -> None:
    """Full early, in the middle and at the end; then there is room, and it goes on."""
    out = disk / "out"
    arguments = [*commands(root)["compress"], "--out", out, "--resume"]
    size = sum(map(len, expected.values())) >> 10
    for share in (0.3, 1.0, 2.0):  # blocks and assembled files are there at the same time
        subprocess.run(["mount", "-o", f"remount,size={round(share * size)}k", disk], check=True)
        refused(svdserve.run(arguments), disk)
        assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    ended = svdserve.run(arguments)
    assert ended.code == 0, ended.errors
    assert contents(out) == expected


def test_a_full_disk_for_the_hidden_streams(
    root: Path, svdserve: Zygote, disk: Path, tmp_path: Path
) -> None:
    """They are mapped into memory; writing to a hole of the file would end in SIGBUS."""
    subprocess.run(["mount", "-o", "remount,size=64k", disk], check=True)
    arguments = [*commands(root)["compress"], "--out", tmp_path / "out"]
    refused(svdserve.run([*arguments, "--offload", disk / "streams"]), tmp_path)


def test_a_limit_of_the_file_size(
    root: Path, svdserve: Zygote, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Like a quota: needs no root."""
    arguments = [*commands(root)["compress"], "--out", tmp_path / "out", "--resume"]
    for limit in (1000, 150_000):
        refused(svdserve.run(arguments, file_limit=limit), tmp_path)
    assert svdserve.run(arguments).code == 0
    assert contents(tmp_path / "out") == expected


def refused(ended: Ended, folder: Path) -> None:
    assert ended.code == 2, ended.errors
    assert "Traceback" not in ended.errors
    last = ended.errors.splitlines()[-1]
    assert re.fullmatch(rf"error: no space left to write {folder}/out: free some space; .*", last)
    assert "--resume" in last or "run the same command again" in last


def test_truncated_input_is_refused(root: Path, svdserve: Zygote, tmp_path: Path) -> None:
    model = shutil.copytree(root / "dense", tmp_path / "model")
    raw = (model / SINGLE_FILE).read_bytes()
    for length in (0, 7, 100, len(raw) // 2, len(raw) - 1):
        (model / SINGLE_FILE).write_bytes(raw[:length])
        ended = svdserve.run(["compress", model, "--out", tmp_path / "out"])
        assert ended.code == 2
        (line,) = ended.errors.splitlines()
        assert "not a readable safetensors file" in line
        assert not (tmp_path / "out").exists()


def test_a_flipped_bit_of_a_finished_checkpoint_is_detected(root: Path, tmp_path: Path) -> None:
    small = shutil.copytree(root / "small", tmp_path / "small")
    count = verify(small)
    assert count >= 4
    generator = random.Random(0)
    names = [line.split()[1] for line in (small / SUMS_FILE).read_text().splitlines()]
    assert len(names) == count
    for name in [*names, *[SINGLE_FILE] * 8]:
        raw = (small / name).read_bytes()
        flipped = bytearray(raw)
        flipped[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        (small / name).write_bytes(flipped)
        with pytest.raises(UserError, match=f"{name}: does not have the digest"):
            verify(small)
        (small / name).write_bytes(raw)
    assert verify(small) == count
    done = subprocess.run(["sha256sum", "--check", SUMS_FILE], cwd=small, check=False)
    assert done.returncode == 0
    (small / SUMS_FILE).write_text("0  ../text.txt\n")
    with pytest.raises(UserError, match="names no file of the directory"):
        verify(small)


def test_a_damaged_block_is_not_resumed_from(
    root: Path, svdserve: Zygote, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """No kill leaves one; a failing disk may."""
    arguments = [*commands(root)["compress"], "--out", tmp_path / "out", "--resume"]
    run = svdserve.start(arguments)
    block = tmp_path / "out.partial" / "block-00000.safetensors"
    wait_for(block)
    run.kill(signal.SIGKILL)
    run.wait()
    os.truncate(block, 5000)
    ended = svdserve.run(arguments)
    assert ended.code == 2
    assert f"{block}: is damaged; remove it" in ended.errors
    block.unlink()
    assert svdserve.run(arguments).code == 0
    assert contents(tmp_path / "out") == expected
