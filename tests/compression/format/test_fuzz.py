"""Checkpoints are untrusted: whatever a stranger writes is refused in one line, or read as it says.

A short, repeatable run belongs to the tests; SVDSERVE_FUZZ=long takes a hundred times the cases, at
random. Files are read a second time by a reader of a few lines that shares nothing with svdserve.
"""

import copy
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from checkpoints import write_checkpoint
from svdserve.compression.evaluation.inspection import inspect_checkpoint, print_inspection
from svdserve.compression.format.log import LOG_FILE
from svdserve.compression.format.reader import check_finite, open_checkpoint
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

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=60, derandomize=True, database=None, **_COMMON)
settings.register_profile("long", max_examples=6000, print_blob=True, **_COMMON)
FUZZ = settings.get_profile(os.environ.get("SVDSERVE_FUZZ", "short"))
FEWER = settings(FUZZ, max_examples=FUZZ.max_examples // 4)  # each loads a model


NAMES = ["pair", "interpolative", "float", "int8", "mlp_in", "q_proj", "F32", "I32", "I8"]

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**4000, 0.5, 1e308]),
    st.floats(),
    st.sampled_from(["", ".", "..", "../canary.safetensors", "/etc/passwd", "a\0b", "x" * 5000]),
    st.sampled_from(["\x1b[31m", "[/red]", "\ud800", *NAMES]),
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


# The victims


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_checkpoint(tmp_path_factory.mktemp("fuzz"))


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


@pytest.fixture(scope="module", params=["whole", "rounded", "version1", "version2"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds of factors in turn, and both old versions of the format."""
    if request.param.startswith("version"):
        source = Path(__file__).with_name("data") / request.param
        return Path(shutil.copytree(source, tmp_path_factory.mktemp("old") / request.param))
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Path)
    return found


@pytest.fixture(scope="module")
def sharded(whole: Path) -> Path:
    return sharded_checkpoint(whole)


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
