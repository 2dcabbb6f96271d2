"""`svdserve compare` as a user types it, on a pico model."""

import json
from pathlib import Path

from typer.testing import CliRunner

from models import save_model
from svdserve.cli.main import app


def test_compare_writes_results_table_and_plot(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model")
    text = tmp_path / "letters.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(5000)))
    out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "table", "svg")}
    recipe = ["--calibration", text, "--tokens", 256, "--seq-len", 32]
    files = ["--json", out["json"], "--table", out["table"], "--plot", out["svg"]]
    methods = ["--method", "svd", "--recipe", "default"]
    grid = ["--keep", 0.7, "--keep", 0.5, "--text", text, "--max-chunks", 1]
    command = ["compare", model, "--work", tmp_path / "work", *methods, *grid, *recipe, *files]
    done = CliRunner().invoke(app, [str(word) for word in command], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(out["json"].read_text())
    names = [(cell["name"], cell["keep"]) for cell in found["cells"]]
    grid_names = [(name, keep) for keep in (0.7, 0.5) for name in ("default", "svd")]
    assert names == [("dense", 1.0), *grid_names]
    for cell in found["cells"][1:]:
        assert (cell["recipe"]["tokens"], cell["recipe"]["seq_len"]) == (256, 32)
    papers = [cell["recipe"] for cell in found["cells"][1:] if cell["name"] == "svd"]
    assert {(r["layout"], r["grouping"], r["allocator"]) for r in papers} == {
        ("pair", "separate", "uniform")
    }
    assert len(out["table"].read_text().splitlines()) == 2 + 5
    assert out["svg"].read_text().startswith("<?xml")
