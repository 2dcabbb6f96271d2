"""Checkpoints are untrusted: whatever a stranger writes is refused in one line, or read as it says.

A short, repeatable run belongs to the tests; SVDSERVE_FUZZ=long takes a hundred times the cases, at
random. Files are read a second time by a reader of a few lines that shares nothing with svdserve.
"""

import copy
import ctypes
import json
import math
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
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from models import random_tokens, save_model
from svdserve.compression.evaluation.inspection import inspect_checkpoint, print_inspection
from svdserve.compression.format.log import LOG_FILE
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.tensors import INDEX_FILE, SINGLE_FILE
from svdserve.compression.format.writer import merge_shards
from svdserve.compression.system.errors import UserError
from svdserve.server.serve import check_model

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=60, derandomize=True, database=None, **_COMMON)
settings.register_profile("long", max_examples=6000, print_blob=True, **_COMMON)
FUZZ = settings.get_profile(os.environ.get("SVDSERVE_FUZZ", "short"))
FEWER = settings(FUZZ, max_examples=FUZZ.max_examples // 4)  # each loads a model

_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I8": 1}


# A reader of its own


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def stored_bytes(path: Path, name: str) -> bytes:
    header, start = read_header(path)
    first, last = header[name]["data_offsets"]
    return path.read_bytes()[start + first : start + last]


def check_as_declared(directory: Path) -> None:
    """What an accepted checkpoint gives is what its header says."""
    checkpoint = open_checkpoint(directory)
    names = list(checkpoint.files.info)
    tensors = checkpoint.files.load(names)
    for name, info in checkpoint.files.info.items():
        entry = read_header(info.file)[0][name]
        assert list(tensors[name].shape) == list(info.shape) == entry["shape"]
        raw = tensors[name].flatten().view(torch.uint8) if info.nbytes else torch.empty(0)
        assert raw.numpy().tobytes() == stored_bytes(info.file, name)
    for name, spec in checkpoint.config.modules.items():
        factors = checkpoint.factors(name)
        assert factors.rank == spec.rank
        assert factors.dense().shape == (sum(spec.out_features), spec.in_features)


# What strangers write

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**4000, 0.5, 1e308]),
    st.floats(),
    st.sampled_from(["", ".", "..", "../canary.safetensors", "/etc/passwd", "a\0b", "x" * 5000]),
    st.sampled_from(["\x1b[31m", "[/red]", "\ud800", "pair", "interpolative", "F32", "I32", "I8"]),
    st.text(max_size=8),
    st.lists(st.integers(-2, 130), max_size=4),
    st.just([[[[]]]]),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, the deep ones too."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from paths_of(inner, (*path, key))


@st.composite
def edited(draw: st.DrawFn, document: Any, steps: int = 2) -> Any:
    """A JSON document with a few values replaced, removed, renamed, exchanged or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, steps))):
        places = list(paths_of(document))
        if not places:
            break
        *parents, key = draw(st.sampled_from(places))
        owner = document
        for parent in parents:
            owner = owner[parent]
        action = draw(st.sampled_from(["replace", "remove", "rename", "exchange", "add"]))
        if action == "remove":
            del owner[key]
        elif action == "exchange":
            keys = list(owner) if isinstance(owner, dict) else range(len(owner))
            other = draw(st.sampled_from(list(keys)))
            owner[key], owner[other] = owner[other], owner[key]
        elif action == "rename" and isinstance(owner, dict):
            owner[draw(st.sampled_from(["x", "", "a.b", "..", "\x1b", f"{key}2"]))] = owner.pop(key)
        elif action == "add" and isinstance(owner, dict):
            owner[draw(st.text(max_size=5))] = copy.deepcopy(draw(junk))  # just() shares its value
        else:
            owner[key] = copy.deepcopy(draw(junk))
    return document


@st.composite
def damaged(draw: st.DrawFn, raw: bytes, reach: int) -> bytes:
    """Bytes with some of the first ``reach`` exchanged, cut off, or with more behind them."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.integers(0, reach - 1))] = draw(st.integers(0, 255))
    cut = draw(st.sampled_from([None, None, 0, 7, 8, 9, reach // 2, reach, len(raw) - 1]))
    return bytes(data[:cut]) + draw(st.sampled_from([b"", b"", b"\0", b"x" * 64]))


def with_header(raw: bytes, header: Any) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


# The victims


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in one file, with a linear that stays dense."""
    root = tmp_path_factory.mktemp("fuzz")
    dense = save_model("llama", root / "dense", num_hidden_layers=1)
    target = write_checkpoint(
        dense,
        root / "whole",
        layout="interpolative",
        shared=True,
        keep_dense=frozenset({"down_proj"}),
    )
    (target / LOG_FILE).touch()
    return target


@pytest.fixture(scope="module")
def rounded(whole: Path) -> Path:
    """The same model in pairs of int8 factors, with scales, and a linear in int8 too."""
    return write_checkpoint(
        whole.with_name("dense"),
        whole.with_name("rounded"),
        layout="pair",
        shared=False,
        keep_dense=frozenset({"down_proj"}),
        int8=True,
    )


@pytest.fixture(scope="module", params=["whole", "rounded"])
def either(request: pytest.FixtureRequest) -> Path:
    """Both kinds of factors in turn."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Path)
    return found


@pytest.fixture(scope="module")
def sharded(whole: Path) -> Path:
    """The same in three files with an index."""
    target = whole.with_name("sharded")
    shutil.copytree(whole, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = sorted(load_file(whole / SINGLE_FILE).items())
    parts = []
    for start in range(3):
        parts.append(target / f"part{start}")
        save_file(dict(tensors[start::3]), parts[-1])
    merge_shards(parts, target, 1)
    for part in parts:
        part.unlink()
    return target


@contextmanager
def changed(source: Path, name: str, content: bytes) -> Iterator[Path]:
    """``source`` with other bytes in one file; put back afterwards."""
    path = source / name
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        yield source
    finally:
        path.write_bytes(original)


def dumped(document: Any) -> bytes:
    text = json.dumps(document) if int_is_short(document) else str(document)
    return text.encode("utf-8", "surrogatepass")


def int_is_short(document: Any) -> bool:
    """Python writes integers of up to 4,300 digits."""
    try:
        json.dumps(document)
    except ValueError:
        return False
    return True


def refused_or_as_declared(directory: Path) -> bool:
    """Through every door that reads files without a model library; whether it was accepted."""
    try:
        check_as_declared(directory)
    except UserError as error:
        event("refused")
        refused(str(error))
        for door in (check_finite_of, inspect_checkpoint):
            with pytest.raises(UserError):
                door(directory)
        try:
            assert not check_model(directory)  # no svdserve model at all any more
        except UserError as again:
            refused(str(again))
        return False
    event("accepted")
    assert check_model(directory)
    check_finite_of(directory)
    print_inspection(inspect_checkpoint(directory))
    return True


def check_finite_of(directory: Path) -> None:
    check_finite(open_checkpoint(directory))


def refused(message: str) -> None:
    assert message
    assert len(message) < 20_000
    assert all(character.isprintable() or character == "\n" for character in message)


@FUZZ
@given(data=st.data())
def test_configurations(either: Path, data: st.DataObject) -> None:
    config = json.loads((either / "config.json").read_text())
    block = config["quantization_config"]
    if data.draw(st.booleans()):
        config = data.draw(edited(config))
    else:
        config["quantization_config"] = data.draw(edited(block))
    with changed(either, "config.json", dumped(config)) as directory:
        refused_or_as_declared(directory)


@FUZZ
@given(data=st.data())
def test_bytes_of_json(whole: Path, data: st.DataObject) -> None:
    raw = (whole / "config.json").read_bytes()
    deep = b"[" * 200_000
    content = data.draw(st.one_of(damaged(raw, len(raw)), st.binary(max_size=40), st.just(deep)))
    with changed(whole, "config.json", content) as directory:
        refused_or_as_declared(directory)


@FUZZ
@given(data=st.data())
def test_headers(either: Path, data: st.DataObject) -> None:
    raw = (either / SINGLE_FILE).read_bytes()
    header, start = read_header(either / SINGLE_FILE)
    content = data.draw(
        st.one_of(
            edited(header).map(lambda document: with_header(raw, document)),
            damaged(raw, start),
            st.integers(0, 2**64 - 1).map(lambda length: struct.pack("<Q", length) + raw[8:]),
        )
    )
    with changed(either, SINGLE_FILE, content) as directory:
        refused_or_as_declared(directory)


@FUZZ
@given(data=st.data())
def test_headers_of_shards(sharded: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in sharded.glob("*.safetensors"))))
    raw = (sharded / name).read_bytes()
    header, start = read_header(sharded / name)
    document = edited(header).map(lambda changed: with_header(raw, changed))
    content = data.draw(st.one_of(document, damaged(raw, start)))
    with changed(sharded, name, content) as directory:
        refused_or_as_declared(directory)


@FUZZ
@given(data=st.data())
def test_logs(whole: Path, data: st.DataObject) -> None:
    """Whatever the log says, the checkpoint is read, and what is told of it is valid JSON."""
    entry = {"event": "group", "module": "model.layers.0.self_attn.qkv_proj", "rank": 3}
    raw = dumped({**entry, "error": 0.25, "beta": 0.5})
    document = edited(json.loads(raw)).map(dumped)
    content = data.draw(st.one_of(document, damaged(raw, len(raw)), st.binary(max_size=40)))
    with changed(whole, LOG_FILE, content) as directory:
        assert refused_or_as_declared(directory)
        told = json.loads(inspect_checkpoint(directory).model_dump_json())
    errors = [module["error"] for module in told["modules"]]
    assert all(error is None or math.isfinite(error) for error in errors)


@FUZZ
@given(data=st.data())
def test_indices(sharded: Path, data: st.DataObject) -> None:
    raw = (sharded / INDEX_FILE).read_bytes()
    document = edited(json.loads(raw)).map(dumped)
    content = data.draw(st.one_of(document, damaged(raw, len(raw))))
    with changed(sharded, INDEX_FILE, content) as directory:
        refused_or_as_declared(directory)


@FEWER
@given(data=st.data())
def test_transformers(whole: Path, data: st.DataObject) -> None:
    """The quantizer refuses what the loader refuses, and what loads computes the same."""
    config = json.loads((whole / "config.json").read_text())
    expected = logits(whole)
    block = data.draw(edited(config["quantization_config"], steps=1))
    config["quantization_config"] = block | {"quant_method": "svdserve"}
    with changed(whole, "config.json", dumped(config)) as directory:
        try:
            found = logits(directory)
        except UserError as error:
            refused(str(error))
        else:
            assert torch.equal(found, expected)


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(random_tokens(1, 8)).logits
    return found


# Files outside


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
