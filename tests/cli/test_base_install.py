"""A base install has nothing that serves, and compresses, inspects and evaluates all the same."""

import os
import subprocess
import sys
from pathlib import Path

from models import save_model

# What only the extras that serve bring along.
BLOCKED = ("vllm", "fastapi", "starlette", "uvicorn", "prometheus_client", "ray", "lm_eval")
PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from svdserve.cli.main import app
for words in COMMANDS:
    app(words, standalone_mode=False)
"""


def test_compress_inspect_and_eval(tmp_path: Path) -> None:
    model, out, text = save_model("llama", tmp_path / "m"), tmp_path / "out", tmp_path / "t.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000)))
    few = ["--calibration", str(text), "--tokens", "128", "--seq-len", "64"]
    commands = [
        ["compress", str(model), "--out", str(out), *few],
        ["inspect", str(out)],
        ["eval", str(model), str(out), "--text", str(text), "--seq-len", "64"],
    ]
    program = f"BLOCKED, COMMANDS = {BLOCKED!r}, {commands!r}\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "perplexity" in done.stdout
