"""What a log record keeps of a path, and what is no path."""

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from svdserve.server.redaction import shorten_paths, shortened


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model='{tmp}/models/small', tokenizer=None", "model='.../small', tokenizer=None"),
        ("saved to {tmp}/cache/a.b/rank_0/model", "saved to .../model"),
        ("init=file://{tmp}/vllm_dist backend=gloo", "init=file:.../vllm_dist backend=gloo"),
        ("[{tmp}/a.json, {tmp}/b.json]", "[.../a.json, .../b.json]"),
        ("GET /v1/models, /metrics and /v1/chat/completions", None),
        ("https://example.org/a/b and 10/20 tokens/s of a/b/c", None),
        ("TTFT 3 ms / TPOT 4 ms", None),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, expected: str | None, tmp_path: Path) -> None:
    given = text.format(tmp=tmp_path)
    assert shortened(given) == (given if expected is None else expected)


def test_a_path_of_a_package_is_told_from_there(tmp_path: Path) -> None:
    line = f'  File "{tmp_path}/lib/site-packages/vllm/v1/core.py", line 3, in run'
    assert shortened(line) == '  File "vllm/v1/core.py", line 3, in run'


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    make = logging.getLogRecordFactory()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("test.paths")
    logger.addHandler(handler)
    shorten_paths()
    yield stream
    logger.removeHandler(handler)
    logging.captureWarnings(False)
    logging.setLogRecordFactory(make)


def test_records_carry_none_in_message_arguments_or_trace(
    stream: io.StringIO, tmp_path: Path
) -> None:
    shorten_paths()  # in vain: once is enough
    logger = logging.getLogger("test.paths")
    logger.warning("loaded %s in %d s", tmp_path / "model", 3)
    try:
        (tmp_path / "none").read_text()
    except OSError:
        logger.exception("failed")
    told = stream.getvalue()
    assert "loaded .../model in 3 s" in told
    assert "FileNotFoundError" in told
    assert f'File ".../{Path(__file__).name}"' in told
    assert str(tmp_path) not in told
    assert sys.prefix not in told


@pytest.mark.usefixtures("stream")
def test_access_records_keep_their_arguments(tmp_path: Path) -> None:
    make = logging.getLogRecordFactory()
    record = make("uvicorn.access", 20, "f", 1, "%s %s", ("GET", f"{tmp_path}/x"), None)
    assert record.args == ("GET", f"{tmp_path}/x")
