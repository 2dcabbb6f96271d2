"""What a user may get wrong at the command line is one line and exit code 2, before the job."""

import os
import sys
from pathlib import Path

import pytest

from models import save_model
from svdserve.cli import main as cli
from svdserve.compression.model.hub import model_name, resolve_model
from svdserve.compression.system.files import check_result_files, write_text

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("input")
    save_model("llama", root / "dense", num_hidden_layers=1)
    (root / "text.txt").write_text(TEXT)
    return root


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The line that `svdserve WORDS` ends with."""
    capsys.readouterr()
    before, sys.argv = sys.argv, ["svdserve", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    errors = capsys.readouterr().err
    assert ended.value.code == 2, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("binary", b"\xff\xfe\x00"),
        ("keys", b"1: 2"),
        ("date", b"keep: 2020-99-99"),
        ("deep", b"[" * 3000),
        ("rate", b"refinement: {learning_rate: .inf}"),
        ("junk", b"refinement: {epochs: {a: 1}}"),
    ],
)
def test_recipes(
    name: str, content: bytes, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_bytes(content)
    refused(capsys, "compress", root / "dense", "--recipe", file, "--out", tmp_path / "out")


@pytest.mark.parametrize("number", ["--threads=99999999", "--seed=-1", "--keep=nan"])
def test_numbers(
    number: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, "compress", root / "dense", number, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "item",
    [
        '{"context": "a", "choices": ["b", "c"], "gold": -1}',
        '{"context": "a", "choices": ["b", "c"], "gold": true}',
        '{"context": "a", "choices": "bc", "gold": 0}',
        '{"context": "a", "choices": ["b", 2], "gold": 0}',
        "[" * 5000,
    ],
)
def test_items_of_tasks(
    item: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task.jsonl").write_text(item)
    line = refused(capsys, "eval", root / "dense", "--task", tmp_path / "task.jsonl")
    assert "line 1 is not a multiple-choice item" in line


@pytest.mark.parametrize("device", ["meta", "cuda:77", "nothing", ""])
def test_devices(
    device: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ("--text", root / "text.txt", "--device", device or "' '")
    refused(capsys, "eval", root / "dense", *text)
    refused(capsys, "compare", root / "dense", "--work", tmp_path / "work", *text)


def test_results_are_checked_before_the_job(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "x.svg", tmp_path / f"{'x' * 300}.svg", ""):
        for command in (
            ("compare", root / "dense", "--work", tmp_path / "w", "--text", root / "text.txt"),
            ("bench", root / "dense", root / "dense"),
        ):
            for flag in ("--json", "--plot"):
                assert "give a" in refused(capsys, *command, flag, place)
    line = refused(capsys, "bench", root / "dense", root / "dense", "--plot", tmp_path / "x.doc")
    assert "ends in .svg or .png" in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("place", ["dense", "dense/inside", "", "link", "link/inside"])
def test_outputs_that_meet_the_model(
    place: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = root / "link"
    if not link.exists():
        link.symlink_to(root / "dense")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for words in (
        ("compress", root / "dense", "--out", root / place, "--force"),
        ("compress", link, "--out", root / place, "--force"),
    ):
        assert "which this command reads; give another folder" in refused(capsys, *words)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_unreadable_model_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied", str(root / "dense" / "config.json"))

    monkeypatch.setattr("svdserve.compression.evaluation.evaluate.perplexity", denied)
    line = refused(capsys, "eval", root / "dense", "--text", root / "text.txt")
    assert line.endswith(
        "config.json: Permission denied; give a path that is there and that you may use"
    )


def test_a_snapshot_is_called_as_on_the_hub(root: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--small-model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert resolve_model(snapshot) == snapshot
    assert model_name(snapshot) == "org/small-model"
    (tmp_path / "link").symlink_to(snapshot)
    assert model_name(tmp_path / "link") == "org/small-model"
    assert model_name(root / "dense") == "dense"


def test_results_may_go_to_a_device(tmp_path: Path) -> None:
    """A pipe of its own: as root a wrong rename would replace a device of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_result_files([pipe])
    write_text(pipe, "results")
    assert os.read(reader, 100) == b"results"
    os.close(reader)
    assert pipe.is_fifo()
