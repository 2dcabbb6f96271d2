"""Kills `svdserve compress` and `svdserve refine` by kill -9 at random moments, and resumes them.

Every run is a process of its own. Half of the kills come at a random time, half before a random
change of the file system; resumed runs are killed too. After each kill the output must be absent or
complete, and in the end its files must equal those of an uninterrupted run byte for byte (except
the log, which has times). The first difference ends the command with exit code 1.

    python benchmarks/reliability/reliability_kill.py --kills 20 --seed 0
"""

import argparse
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.extend(
    str(Path(__file__).parents[2] / "tests" / part) for part in ("support", "processes")
)

from kills import kill_and_resume
from models import CONFIGS, save_model
from svdserve.compression.system.files import write_json
from svdserve.compression.system.machine import this_machine
from zygote import zygote

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(20_000))
RECIPE = """\
tokens: 1024
seq_len: 64
refinement:
  epochs: 1
  evaluations: 4
"""


def main() -> None:
    """Run it and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("results/reliability_kill.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, zygote(Path(folder)) as svdserve:
        root = Path(folder)
        (root / "text.txt").write_text(TEXT)
        (root / "recipe.yaml").write_text(f"{RECIPE}calibration: {root / 'text.txt'}\n")
        save_model("llama", root / "dense", dtype=torch.bfloat16)
        compress = ["compress", root / "dense", "--recipe", root / "recipe.yaml"]
        done = svdserve.run([*compress, "--out", root / "small"])
        assert done.code == 0, done.errors
        text = ["--calibration", root / "text.txt"]
        refine = ["refine", root / "dense", root / "small", *text, "--evaluations", "6"]
        found = {}
        for name, command in (("compress", compress), ("refine", refine)):
            found[name] = kill_and_resume(
                svdserve, command, root / f"{name}-out", given.kills, given.seed
            )
            print(f"{name}: {given.kills} kills, every output as it should be")
    config = CONFIGS["llama"]
    result = {
        "model": f"pico llama, random: {config.num_hidden_layers} blocks of {config.hidden_size}",
        "recipe": RECIPE,
        "seed": given.seed,
        "identical_bytes": True,
        "commands": found,
        "system": platform.platform(),
        "machine": this_machine().model_dump(mode="json"),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.json, result)


if __name__ == "__main__":
    main()
