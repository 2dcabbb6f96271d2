"""`svdserve serve` as a user types it, up to the check of the model."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from commands import svdserve
from svdserve.cli.main import app
from svdserve.compression.system.errors import UserError


@pytest.mark.vllm
def test_the_command_line_hands_over_the_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the check of the directory, which holds no model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").mkdir()

    def refused(line: str) -> str:
        done = CliRunner().invoke(app, ["serve", *line.split()])
        assert isinstance(done.exception, UserError), done.output
        return str(done.exception)

    for line in (
        "--port 8131 DIR",
        "--max-body-bytes 100 --port 8131 DIR",
        "--served-model-name a -- DIR",
        "-cc.cudagraph_mode=NONE DIR",
        "DIR --port 8131 --metrics-auth none",
    ):
        assert refused(line).startswith("DIR"), line
    assert "given: none" in refused("--port 8131")
    assert "--verify" in CliRunner().invoke(app, ["serve", "-h"]).output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--metrics-auth", "x"), "--metrics-auth: Input should be 'key' or 'none' (given: 'x')"),
        (("--max-body-bytes", "0"), "--max-body-bytes: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_option_is_one_line(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = svdserve("serve", tmp_path, *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {says}")
