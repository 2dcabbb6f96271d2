"""All measurements on a GPU in one command: about 7 minutes, without network and vLLM.

    python benchmarks/gpu/suite.py --out results/gpu_h100.json [--table FILE] [--dry]

It needs Triton and what svdserve needs to compress. It runs these parts, and writes the result of
each as soon as it is known:

* which configuration is fastest for each number of rows, and whether the results of the chosen ones
  are right (compared in float64); together these make the GPU's dispatch table;
* times of every layer of 8B and 70B shapes beside dense;
* a whole decoder of 8B shape;
* the linear algebra of compression;
* the compression of two blocks.

``--dry`` runs all of it on tiny shapes on the CPU, with Triton's interpreter in place of the GPU.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("compression", "kernels", "server")]
if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from svdserve.compression.system.files import make_folder, write_json  # noqa: E402

PARTS = ("kernels", "layers", "decoder", "linear_algebra", "compression")


def main() -> int:
    """Run the parts; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="results file to write")
    parser.add_argument("--table", type=Path, help="dispatch table of the GPU to write")
    parser.add_argument(
        "--seconds", type=float, default=420, help="time limit; parts beyond it are left out"
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on the CPU")
    arguments = parser.parse_args()
    suite = Suite(arguments.out, arguments.table, arguments.seconds, arguments.dry)
    for name in arguments.parts:
        suite.part(name)
    return 1 if suite.report["failed"] else 0


class Suite:
    """Runs the parts, and holds the report and the time that is left."""

    def __init__(self, out: Path, table: Path | None, seconds: float, dry: bool) -> None:
        self.out, self.table_file, self.dry = out, table, dry
        self.end = time.monotonic() + seconds
        for file in filter(None, (out, table)):
            make_folder(file.parent)
        self.device = torch.device("cpu" if dry else "cuda")
        self.report: dict[str, Any] = {
            "command": "python benchmarks/gpu/suite.py" + (" --dry" if dry else ""),
            "machine": _machine(dry),
            "failed": {},
            "seconds": {},
        }
        from svdserve.kernels.triton.configs import PRODUCTS, Plan

        self.plan: Plan = (PRODUCTS,)

    def part(self, name: str) -> None:
        """Run one part; a failure is reported and the next part runs."""
        start = time.monotonic()
        print(f"{name}: {self.left():.0f} s left", flush=True)
        try:
            if self.left() < 0:
                raise TimeoutError("no time was left")
            getattr(self, f"_{name}")()
        except Exception:
            traceback.print_exc()
            self.report["failed"][name] = traceback.format_exc()[-3000:]
        self.report["seconds"][name] = round(time.monotonic() - start, 1)
        write_json(self.out, self.report)

    def left(self) -> float:
        return self.end - time.monotonic()

    def until(self, reserve: float) -> Callable[[], float]:
        """A function of the seconds left, minus a reserve for the parts that follow."""
        return lambda: self.left() - reserve

    def _kernels(self) -> None:
        import layers

        from svdserve.kernels.triton.table import Table

        entry, self.report["tuning"] = layers.tune(self.device, self.dry)
        write_json(self.out, self.report)
        first = layers.single(16, layers.T(16, 16, 128, 2, 5))
        self.report["correctness"] = layers.correctness(self.device, (*entry.plan, first), self.dry)
        if self.report["correctness"]["wrong"]:
            raise ValueError(f"wrong results: {self.report['correctness']['wrong']}")
        self.plan = entry.plan
        if self.table_file:
            machine = self.report["machine"]
            table = Table(card=machine.get("card", "cpu"), machine=machine, entries=(entry,))
            write_json(self.table_file, table.model_dump(mode="json"))

    def _layers(self) -> None:
        import layers

        self.report["layers"] = layers.times(self.device, self.plan, self.dry, self.until(150))

    def _decoder(self) -> None:
        import decoder

        self.report["decoder"] = decoder.measure(self.device, self.plan, self.dry, self.until(90))

    def _linear_algebra(self) -> None:
        import factoring

        self.report["linear_algebra"] = factoring.primitives(self.device, self.dry, self.until(60))

    def _compression(self) -> None:
        import factoring

        with tempfile.TemporaryDirectory() as work:
            found = factoring.compression(ROOT, Path(work), self.dry, max(self.left(), 30))
        self.report["compression"] = found
        if found["exit_code"] != 0:
            raise ValueError(f"compress ended with {found['exit_code']}")


def _machine(dry: bool) -> dict[str, Any]:
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    if not dry:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "card": card.name,
            "memory_gib": card.total_memory >> 30,
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
