"""Files that lead out of a checkpoint's directory, oddities in it, and declared sizes."""

import ctypes
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from svdserve.compression.evaluation.inspection import inspect_checkpoint
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.format.tensors import INDEX_FILE, SINGLE_FILE
from svdserve.compression.system.errors import UserError
from svdserve.server.serve import check_model
from victims import (
    check_as_declared,
    logits,
    read_header,
    sharded_checkpoint,
    whole_checkpoint,
    with_header,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_checkpoint(tmp_path_factory.mktemp("untrusted"))


@pytest.fixture(scope="module")
def sharded(whole: Path) -> Path:
    return sharded_checkpoint(whole)


class Watch:
    """Every open of a file of one folder, by any code of any process (Linux: inotify)."""

    IN_OPEN = 0x20

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK)
        if self._fd < 0 or self._libc.inotify_add_watch(self._fd, bytes(folder), self.IN_OPEN) < 0:
            pytest.skip("no inotify")

    def opened(self) -> bool:
        try:
            return bool(os.read(self._fd, 65536))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def victim(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "victim"))


@pytest.fixture
def canary(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with a whole checkpoint, none of which may be opened."""
    folder = Path(shutil.copytree(whole, tmp_path / "outside"))
    watch = Watch(folder)
    (folder / "config.json").read_bytes()
    assert watch.opened()  # the trap works
    yield folder
    assert not watch.opened()
    watch.close()


@pytest.mark.parametrize(
    "name",
    ["config.json", SINGLE_FILE, "generation_config.json", "tokenizer.json", "SHA256SUMS", "sub"],
)
@pytest.mark.parametrize("relative", [True, False])
def test_links_out_of_the_directory(victim: Path, canary: Path, name: str, relative: bool) -> None:
    (victim / name).unlink(missing_ok=True)
    target = canary / name if name != "sub" else canary
    if not target.exists():
        target = canary / SINGLE_FILE
    (victim / name).symlink_to(os.path.relpath(target, victim) if relative else target)
    for door in (open_checkpoint, check_model, inspect_checkpoint):
        with pytest.raises(UserError, match=f"{name}: is a link out of its directory"):
            door(victim)


def test_an_index_that_leads_out(victim: Path, canary: Path) -> None:
    names = load_file(victim / SINGLE_FILE)
    for target in ("../outside/model.safetensors", str(canary / SINGLE_FILE), "..", "a/../b"):
        (victim / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, target)}))
        for door in (open_checkpoint, check_model):
            with pytest.raises(UserError, match=r"file names of this directory|is missing"):
                door(victim)


def test_python_opens_nothing_else(victim: Path) -> None:
    """Seen by an audit hook: what svdserve opens lies in the directory."""
    paths: list[str] | None = None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and paths is not None and isinstance(arguments[0], str):
            paths.append(arguments[0])

    sys.addaudithook(hook)  # stays until the process ends, hence the switch
    inspect_checkpoint(victim)  # what is imported late is imported now
    paths = []
    inspect_checkpoint(victim)
    check_model(victim)
    opened, paths = paths, None
    assert opened
    assert {Path(path).parent for path in opened} == {victim}


def test_links_that_stay_inside(whole: Path, tmp_path: Path) -> None:
    """As the Hub's cache has them: a snapshot links to the blobs beside it."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    shutil.copytree(whole, repository / "blobs")
    snapshot.mkdir(parents=True)
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    check_as_declared(snapshot)
    assert logits(snapshot).equal(logits(whole))
    (repository / "blobs").rename(tmp_path / "blobs")
    (repository / "blobs").symlink_to(tmp_path / "blobs")
    with pytest.raises(UserError, match="is a link out of its directory"):
        open_checkpoint(snapshot)


def test_pipes_and_other_oddities_are_refused(victim: Path) -> None:
    os.mkfifo(victim / "tokenizer_config2.json")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        open_checkpoint(victim)
    (victim / "tokenizer_config2.json").unlink()
    (victim / "loop.json").symlink_to("loop.json")
    with pytest.raises(UserError, match=r"loop.json: cannot be read"):
        open_checkpoint(victim)
    (victim / "loop.json").unlink()
    (victim / "config.json").unlink()
    (victim / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config.json: cannot be read \(Is a directory\)"):
        open_checkpoint(victim)


def test_files_that_only_one_reader_would_take_are_refused(victim: Path, sharded: Path) -> None:
    """vLLM reads all safetensors where there is no index; transformers prefers the single file."""
    shutil.copy(victim / SINGLE_FILE, victim / "consolidated.safetensors")
    with pytest.raises(UserError, match=r"consolidated.safetensors: does not belong"):
        open_checkpoint(victim)
    (victim / SINGLE_FILE).unlink()
    with pytest.raises(UserError, match="has neither"):
        open_checkpoint(victim)
    with (
        changed_tree(sharded, SINGLE_FILE, victim / "consolidated.safetensors"),
        pytest.raises(UserError, match=r"model.safetensors: does not belong"),
    ):
        open_checkpoint(sharded)


@contextmanager
def changed_tree(directory: Path, name: str, source: Path) -> Iterator[None]:
    shutil.copy(source, directory / name)
    try:
        yield
    finally:
        (directory / name).unlink()


def test_factors_without_their_configuration_are_not_served_as_a_dense_model(victim: Path) -> None:
    config = json.loads((victim / "config.json").read_text())
    del config["quantization_config"]
    (victim / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has low-rank factors"):
        check_model(victim)


# Memory

_LIMITED = """
import json, resource, sys
from pathlib import Path
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.system.errors import UserError
from svdserve.server.serve import check_model
check_finite(open_checkpoint(Path(sys.argv[1])))  # imports and buffers are there now
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for path in sys.argv[1:]:
    for door in (open_checkpoint, check_model):
        try:
            door(Path(path))
            print(json.dumps(None))
        except UserError as error:
            print(json.dumps(str(error)))
"""


def huge_cases(whole: Path, root: Path) -> Iterator[Path]:
    """Directories that declare far more than they hold."""

    def case(name: str) -> Path:
        return Path(shutil.copytree(whole, root / name))

    raw = (whole / SINGLE_FILE).read_bytes()
    header, _ = read_header(whole / SINGLE_FILE)
    name = "model.embed_tokens.weight"
    for number, shape in enumerate(([2**40, 128], [2**62, 2**62], [10**18], [-1, 128])):
        directory = case(f"shape{number}")
        (directory / SINGLE_FILE).write_bytes(
            with_header(raw, header | {name: header[name] | {"shape": shape}})
        )
        yield directory
    directory = case("offsets")
    entry = header[name] | {"shape": [2**38], "data_offsets": [0, 2**40]}
    (directory / SINGLE_FILE).write_bytes(with_header(raw, {name: entry}))
    yield directory
    for number, length in enumerate((2**40, 2**63, 99_999_999)):
        directory = case(f"length{number}")
        (directory / SINGLE_FILE).write_bytes(struct.pack("<Q", length) + raw[8:])
        yield directory
    directory = case("json")
    with (directory / "config.json").open("r+b") as file:
        file.truncate(4 << 30)
    yield directory
    for key in ("num_hidden_layers", "vocab_size", "hidden_size", "max_position_embeddings"):
        directory = case(key)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {key: 10**9}))
        yield directory
    directory = case("rank")
    config = json.loads((directory / "config.json").read_text())
    spec = next(iter(config["quantization_config"]["modules"].values()))
    spec |= {"rank": 2**40, "in": 2**41, "out": [2**41] * len(spec["out"])}
    (directory / "config.json").write_text(json.dumps(config))
    yield directory


def test_no_memory_for_what_is_only_declared(whole: Path, tmp_path: Path) -> None:
    cases = list(huge_cases(whole, tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, whole, *cases], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert messages[:2] == [None, None]
    assert len(messages) == 2 * (1 + len(cases))
    assert all(messages[2:]), list(zip(cases, messages[2::2], strict=True))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak < 8 << 20  # KiB
