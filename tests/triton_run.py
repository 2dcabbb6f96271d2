"""Run low-rank linears in Triton's interpreter, in one fresh process for all of them.

``run`` is called by tests; the module itself is the script of that process. The interpreter must be
asked for before Triton is imported, and would then hold for everything else in the process.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_cases import Shape, inputs
from svdserve.kernels import Part, lowrank_linear, prepare


@dataclass(frozen=True)
class Job:
    """One call; several shapes are several parts.

    ``prepared`` False is the public operation; ``compiled`` is through torch.compile.
    """

    shapes: tuple[Shape, ...]
    rows: int
    dtype: torch.dtype
    bias: bool = True
    prepared: bool = True
    compiled: bool = False

    def parts(self) -> list[Part]:
        return [shape.part(self.dtype, seed) for seed, shape in enumerate(self.shapes)]

    def arguments(self) -> tuple[Tensor, Tensor | None]:
        """x, and the bias of all parts."""
        outputs = sum(shape.outputs for shape in self.shapes)
        bias = inputs(1, outputs, self.dtype)[0] if self.bias else None
        return inputs(self.rows, self.shapes[0].channels, self.dtype), bias

    def __str__(self) -> str:
        name = "+".join(map(str, self.shapes))
        return f"{name}-{self.rows}-{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Interpreted:
    """Outputs of the jobs, twice each, and the launches: kernel and compile-time arguments."""

    first: list[Tensor]
    second: list[Tensor]
    launches: set[tuple[str, str]]


def run(folder: Path, jobs: list[Job]) -> Interpreted:
    """Compute all jobs."""
    plain = [asdict(job) | {"dtype": str(job.dtype).removeprefix("torch.")} for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(plain))
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = load_file(folder / "outputs.safetensors")
    first, second = ([found[f"{i}.{k}"] for i in range(len(jobs))] for k in ("first", "second"))
    launches = {tuple(one) for one in json.loads((folder / "launches.json").read_text())}
    return Interpreted(first, second, launches)


_FIXED = (
    "READ",
    "SPLITS",
    "EARLY",
    "LINES",
    "PRECISION",
    "BT",
    "BN",
    "BK",
    "num_warps",
    "num_stages",
    "enable_fp_fusion",
)


class _Recorder:
    """Passes launches on to a kernel and notes their compile-time arguments."""

    launches: ClassVar[set[tuple[str, str]]] = set()

    def __init__(self, name: str, kernel: Any) -> None:
        self.name, self.kernel, self.arg_names = name, kernel, kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**given: Any) -> None:
            dtype = str(given["z_ptr"].dtype).removeprefix("torch.")
            fixed = {"dtype": dtype} | {k: v for k, v in given.items() if k in _FIXED}
            self.launches.add((self.name, json.dumps(fixed, sort_keys=True)))
            self.kernel[grid](**given)

        return launch


def _main(folder: Path) -> None:
    from svdserve.kernels import triton_kernels

    for name in ("shrink", "expand", "shrink_expand"):
        setattr(triton_kernels, name, _Recorder(name, getattr(triton_kernels, name)))
    outputs = {}
    for index, plain in enumerate(json.loads((folder / "jobs.json").read_text())):
        shapes = tuple(Shape(**shape) for shape in plain.pop("shapes"))
        job = Job(shapes, **(plain | {"dtype": getattr(torch, plain["dtype"])}))
        x, bias = job.arguments()
        if job.prepared:
            module: Any = prepare(job.parts(), implementation="triton")
            if job.compiled:
                module = torch.compile(module, fullgraph=True, backend="aot_eager")
            outputs[f"{index}.first"], outputs[f"{index}.second"] = module(x, bias), module(x, bias)
        else:
            (part,) = job.parts()
            for name in ("first", "second"):
                y = lowrank_linear(x, *part, bias, implementation="triton")
                outputs[f"{index}.{name}"] = y
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "launches.json").write_text(json.dumps(sorted(_Recorder.launches)))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
