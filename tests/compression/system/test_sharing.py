"""Folders that several jobs use at the same time, and systems that lack what Linux has."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from models import save_model
from svdserve.compression.evaluation.perplexity import perplexity
from svdserve.compression.format.log import LOG_FILE, log_event
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.pipeline.card import CARD_FILE
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Refinement, Run, make_recipe
from svdserve.compression.pipeline.stages.refine import refine
from svdserve.compression.pipeline.walk.walk import Streams
from svdserve.compression.statistics.cache import sweeping
from svdserve.compression.system import files, memory
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import (
    check_output,
    remove_temporaries,
    replacing,
    write_text,
)

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharing")
    (root / "text.txt").write_text(TEXT)
    save_model("llama", root / "dense", num_hidden_layers=1)
    recipe = make_recipe(method="svd", allocator="uniform")
    compress(str(root / "dense"), root / "small", recipe, Run(progress=False))
    return root


def test_streams_of_two_jobs_in_one_folder(tmp_path: Path) -> None:
    one, two = (Streams((2, 3), torch.float32, CPU, tmp_path) for _ in range(2))
    rows = slice(0, 2)
    one.write("student", rows, torch.ones(2, 3, 4))
    two.write("student", rows, torch.zeros(2, 3, 4))
    two.drop("student")
    assert one.read("student", rows).equal(torch.ones(2, 3, 4))
    one.drop("student")
    assert not list(tmp_path.iterdir())


def test_one_process_sweeps_a_cache_and_the_others_wait(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with sweeping(tmp_path):
            order.append("second")

    left = tmp_path / ".gradient-00001.safetensors.0123.svdserve-tmp"
    left.touch()
    with sweeping(tmp_path):
        assert not left.exists()  # of a killed run
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_temporaries_of_killed_runs(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    name = "ж" * 100  # 200 bytes
    with replacing(tmp_path / name) as temporary:
        temporary.touch()
        (tmp_path / "folder" / temporary.name).touch()
        shutil.copy(temporary, tmp_path / f"{temporary.name[:20]}-2.svdserve-tmp")
    remove_temporaries(tmp_path, "**/*")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name]


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_an_output_that_lies_in_an_input(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for out in (tmp_path / "model" / "a" / "b", tmp_path / "link" / "out"):
        with pytest.raises(UserError, match=r"lies in .*model, which this command reads"):
            check_output(out, [tmp_path / "model"])


def test_a_teacher_of_the_same_sizes_is_another_one(root: Path, tmp_path: Path) -> None:
    other = save_model("llama", tmp_path / "other", seed=1, num_hidden_layers=1)
    settings = Refinement(calibration=str(root / "text.txt"), tokens=256, seq_len=32, epochs=1)
    with pytest.raises(UserError, match=r"other: model.*norm.weight differs from"):
        refine(str(other), root / "small", tmp_path / "out", settings, Run(progress=False))
    assert not (tmp_path / "out").exists()


def test_refine_leaves_hidden_folders_behind_and_the_card_tells_of_the_log(
    root: Path, tmp_path: Path
) -> None:
    small = shutil.copytree(root / "small", tmp_path / "small")
    (small / ".git").mkdir()
    (small / ".git" / "config").write_text("")
    log_event(small / LOG_FILE, "resumed_anyway", before={}, after={})
    settings = Refinement(calibration=str(root / "text.txt"), tokens=256, seq_len=32, epochs=1)
    refine(str(root / "dense"), small, tmp_path / "out", settings, Run(progress=False))
    open_checkpoint(tmp_path / "out")
    assert not (tmp_path / "out" / ".git").exists()
    assert "`--resume-anyway`" in (tmp_path / "out" / CARD_FILE).read_text()
    assert "--resume-anyway" not in (root / "small" / CARD_FILE).read_text()


def test_compress_and_eval_where_linux_is_missing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sched_getaffinity", "posix_fallocate"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(memory, "_TRIM", None)
    read = Path.read_text

    def without_proc(path: Path, *args: object, **kwargs: object) -> str:
        if path.is_relative_to("/proc"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return read(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", without_proc)
    recipe = make_recipe(calibration=str(root / "text.txt"), tokens=256, seq_len=32)
    run = Run(progress=False, offload=tmp_path / "streams")
    report = compress(str(root / "dense"), tmp_path / "out", recipe, run)
    assert report.peak_bytes > 1 << 20
    result = perplexity(tmp_path / "out", root / "text.txt", seq_len=32, progress=False)
    assert result.machine.cores >= 1
