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

    ``prepared`` False is the public operation; ``compiled`` is through torch.compile. ``config``
    is a name in ``configurations``, empty for what would be taken. ``table`` is a dispatch table as
    JSON, which then decides alone. Launches by either are not among ``Interpreted.launches``.
    """

    shapes: tuple[Shape, ...]
    rows: int
    dtype: torch.dtype
    bias: bool = True
    prepared: bool = True
    compiled: bool = False
    config: str = ""
    in_order: bool = False
    table: str = ""

    def parts(self) -> list[Part]:
        return [shape.part(self.dtype, seed) for seed, shape in enumerate(self.shapes)]

    def arguments(self) -> tuple[Tensor, Tensor | None]:
        """x, and the bias of all parts."""
        outputs = sum(shape.outputs for shape in self.shapes)
        bias = inputs(1, outputs, self.dtype)[0] if self.bias else None
        return inputs(self.rows, self.shapes[0].channels, self.dtype), bias

    def __str__(self) -> str:
        name = "+".join(map(str, self.shapes))
        kind = f"{self.config}{'-in-order' if self.in_order else ''}"
        return f"{name}-{self.rows}-{str(self.dtype).removeprefix('torch.')}{kind and '-' + kind}"


@dataclass(frozen=True)
class Interpreted:
    """What became of the jobs.

    Attributes:
        first, second: outputs of each job, which is run twice.
        launches: kernel and compile-time arguments of every launch.
        kernels: the names of the kernels that each job launched, but for gather.
    """

    first: list[Tensor]
    second: list[Tensor]
    launches: set[tuple[str, str]]
    kernels: list[set[str]]


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
    noted = json.loads((folder / "launches.json").read_text())
    launches = {tuple(one) for one in noted["launches"]}
    return Interpreted(first, second, launches, [set(names) for names in noted["kernels"]])


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

    noting: ClassVar[bool] = True
    names: ClassVar[set[str]] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**given: Any) -> None:
            dtype = str(given["z_ptr"].dtype).removeprefix("torch.")
            fixed = {"dtype": dtype} | {k: v for k, v in given.items() if k in _FIXED}
            self.names.add(self.name)
            if self.noting:
                self.launches.add((self.name, json.dumps(fixed, sort_keys=True)))
            self.kernel[grid](**given)

        return launch


CONFIGURATIONS = ("one-split", "two-split", "products")


def configurations() -> dict[str, Any]:
    """Plans of what is not guessed, by name: shrinks with split sums, the device's products."""
    from svdserve.kernels.triton.configs import PRODUCTS, Config, Tile, single

    split = Tile(16, 16, 64, warps=2, stages=3, splits=4)
    found = (
        (single(16, Tile(16, 16, 64, warps=2, stages=3, splits=3)), PRODUCTS),
        (Config(16, split, Tile(32, 32, 64, 2, 3)), PRODUCTS),
        (PRODUCTS,),
    )
    return dict(zip(CONFIGURATIONS, found, strict=True))


def _main(folder: Path) -> None:
    from svdserve.kernels.triton import kernels

    for name in ("shrink", "expand", "shrink_expand"):
        setattr(kernels, name, _Recorder(name, getattr(kernels, name)))
    from svdserve.kernels.operation import _ascending as ascending
    from svdserve.kernels.triton.linear import TritonFactors
    from svdserve.kernels.triton.table import Table

    outputs = {}
    launched = []
    module: Any
    for index, plain in enumerate(json.loads((folder / "jobs.json").read_text())):
        shapes = tuple(Shape(**shape) for shape in plain.pop("shapes"))
        job = Job(shapes, **(plain | {"dtype": getattr(torch, plain["dtype"])}))
        x, bias = job.arguments()
        _Recorder.noting = not job.config and not job.table
        _Recorder.names.clear()
        if job.config:
            parts = [ascending(part) for part in job.parts()]
            module = TritonFactors(parts, configurations()[job.config], job.in_order)
            if job.in_order:
                x = torch.where(module.order >= 0, x[:, module.order.clamp(min=0)], 0)
            outputs[f"{index}.first"], outputs[f"{index}.second"] = module(x, bias), module(x, bias)
        elif job.prepared:
            if job.table:
                module = prepare(job.parts(), table=Table.model_validate_json(job.table))
            else:
                module = prepare(job.parts(), implementation="triton")
            if job.compiled:
                module = torch.compile(module, fullgraph=True, backend="aot_eager")
            outputs[f"{index}.first"], outputs[f"{index}.second"] = module(x, bias), module(x, bias)
        else:
            (part,) = job.parts()
            for name in ("first", "second"):
                y = lowrank_linear(x, *part, bias, implementation="triton")
                outputs[f"{index}.{name}"] = y
        launched.append(sorted(_Recorder.names))
    save_file(outputs, folder / "outputs.safetensors")
    noted = {"launches": sorted(_Recorder.launches), "kernels": launched}
    (folder / "launches.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
