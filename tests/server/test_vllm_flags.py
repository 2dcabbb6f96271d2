"""The model among the words of `svdserve serve`, told apart by the parser of the real vLLM."""

import subprocess
import sys
from pathlib import Path

import pytest

from svdserve.compression.system.errors import UserError
from svdserve.server.vllm_flags import find_model, serve_flags

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with two directories, DIR and OTHER."""
    monkeypatch.chdir(tmp_path)
    for name in ("DIR", "OTHER"):
        (tmp_path / name).mkdir()


@pytest.mark.parametrize(
    ("line", "rest"),
    [
        ("DIR --port 8131", "--port 8131"),
        ("--port 8131 DIR", "--port 8131"),
        ("--port=8131 DIR --enforce-eager", "--port=8131 --enforce-eager"),
        ("--enforce-eager DIR", "--enforce-eager"),
        ("--no-enable-prefix-caching DIR", "--no-enable-prefix-caching"),
        (
            "--download-dir OTHER --enable-sleep-mode DIR",
            "--download-dir OTHER --enable-sleep-mode",
        ),
        ("--tokenizer OTHER DIR --tokenizer-mode slow", "--tokenizer OTHER --tokenizer-mode slow"),
        ("DIR --served-model-name a b", "--served-model-name a b"),
        ("--served-model-name a b DIR", "--served-model-name a b"),
        ("--served-model-name a b -- DIR", "--served-model-name a b"),
        (
            "--served_model_name a --max_model_len 64 DIR",
            "--served_model_name a --max_model_len 64",
        ),
        ("-tp 2 DIR -O 1", "-tp 2 -O 1"),
        ("-O3 DIR", "-O3"),
        ("-cc.cudagraph_mode=NONE DIR", "-cc.cudagraph_mode=NONE"),
        ("-cc.cudagraph_mode NONE DIR", "-cc.cudagraph_mode NONE"),
        ("--port 8131 --model DIR", "--port 8131"),
        ("--model=DIR --port 8131", "--port 8131"),
    ],
)
def test_the_model_is_found_in_any_order(line: str, rest: str) -> None:
    assert find_model(line.split()) == ("DIR", rest.split())


def test_hub_names_are_found_too() -> None:
    line = "org/name --served-model-name a b --host 0.0.0.0"
    assert find_model(line.split()) == ("org/name", line.split()[1:])
    assert find_model(["--dtype", "float32", "org/name"]) == ("org/name", ["--dtype", "float32"])


def test_the_file_of_flags_may_name_it() -> None:
    assert find_model(["--config", "f.yaml"], "DIR") == ("DIR", ["--config", "f.yaml"])
    assert find_model(["DIR", "--config", "f.yaml"], "OTHER")[0] == "DIR"


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("", "none"),
        ("--port 8131", "none"),
        ("--served-model-name a b", "none"),
        ("DIR OTHER", "DIR, OTHER"),
        ("--enforce-eager DIR OTHER", "DIR, OTHER"),
        ("DIR --model OTHER", "OTHER, DIR"),
        ("--port 8131 -- DIR OTHER", "DIR, OTHER"),
    ],
)
def test_no_model_or_two_are_refused(line: str, given: str) -> None:
    with pytest.raises(UserError, match=rf"takes one model; given: {given}\. Give one directory"):
        find_model(line.split())


def test_every_flag_of_vllm_that_takes_a_value_may_precede_the_model() -> None:
    flags = serve_flags()
    assert len(flags) > 200
    for flag, nargs in flags.items():
        values = {None: ["OTHER"], "?": ["OTHER"], 0: []}.get(nargs, ["a", "OTHER"])  # type: ignore[arg-type]
        if flag not in ("--model", "-O") and nargs not in ("+", "*"):
            assert find_model([flag, *values, "DIR"])[0] == "DIR", flag


def test_a_model_that_stands_first_is_found_without_vllm() -> None:
    code = (
        "import sys; from svdserve.server.vllm_flags import find_model;"
        "find_model(['DIR', '--port', '8131']); assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
