"""Compile every configuration of the Triton kernels for several GPUs, without having one.

``python -m svdserve.kernels.triton.aot --json results/triton_kernels.json`` writes what the
compiler and the disassembler report: registers, spills, shared memory, 128-bit loads, tensor-core
instructions. It needs only Triton, which includes NVIDIA's ptxas, cuobjdump and nvdisasm and AMD's
compiler.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svdserve.kernels.triton import kernels
from svdserve.kernels.triton.configs import GUESSES, Config
from svdserve.kernels.triton.launch import GATHERED, PLAIN, compile_options, interpreted


@dataclass(frozen=True)
class Target:
    """A family of GPUs to compile for.

    Attributes:
        gpu: Triton's description of it.
        shared_limit: the most bytes of shared memory that a block can have.
        tensor_core: a regular expression for instructions that multiply matrices.
        load, wide_load: the same for instructions that read global memory, and 128 bits of it.
        spill: the same for instructions that access spilled registers.
    """

    gpu: GPUTarget
    shared_limit: int
    tensor_core: str
    load: str
    wide_load: str
    spill: str

    @classmethod
    def nvidia(cls, capability: int, shared_kib: int) -> "Target":
        # HMMA is mma.sync, HGMMA is wgmma, UTC.MMA is tcgen05.mma.
        names = "HMMA|HGMMA|UTC.*MMA", r"LDG(STS)?\b", r"LDG(STS)?\..*128", r"(LDL|STL)\b"
        return cls(GPUTarget("cuda", capability, 32), shared_kib * 1024, *names)


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD
# Instinct MI300 Instruction Set Architecture, local data share.
TARGETS = {
    "sm_80": Target.nvidia(80, 163),
    "sm_90": Target.nvidia(90, 227),
    "sm_100": Target.nvidia(100, 227),
    "gfx942": Target(
        GPUTarget("hip", "gfx942", 64),
        64 * 1024,
        "v_mfma",
        "(global|buffer)_load",
        "(global|buffer)_load_dwordx4",
        "scratch_",
    ),
}
# The targets that can start a kernel while the previous one ends.
EARLY_TARGETS = ("sm_90", "sm_100")
_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_AMDGCN = re.compile(r"^\s+([a-z]\w*)", re.MULTILINE)
_POINTERS = dict.fromkeys(
    ("channels_ptr", "pivots_ptr", "parts_ptr", "counters_ptr", "arrivals_ptr"), "i32"
)
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """One kernel with the compile-time arguments of a launch, for one of ``TARGETS``."""

    kernel: str
    dtype: torch.dtype
    config: Config
    read: int | None
    target: str

    @property
    def fixed(self) -> dict[str, object]:
        """The arguments that are known when the kernel is compiled."""
        shrink, expand = self.config.shrink, self.config.expand
        assert shrink is not None
        assert expand is not None
        read = {} if self.read is None else {"READ": self.read}
        on_amd = TARGETS[self.target].gpu.backend == "hip"
        tile = expand if self.kernel == "expand" else shrink
        early = self.config.launch == "early"
        options = compile_options(tile, self.dtype, on_amd, early=early)
        splits = {} if self.kernel == "expand" else {"SPLITS": shrink.splits}
        if self.kernel == "shrink_expand":  # a single launch has no second kernel to start early
            del options["EARLY"]
        return options | read | splits


@dataclass(frozen=True)
class Compiled:
    """The result of compiling a variant; memory is in bytes, instructions are counted in the code.

    Attributes:
        fixed: dtype and compile-time arguments of the launch.
        loads, wide_loads: instructions that read global memory, and those that read 128 bits.
        stack_bytes, spills: memory for spilled registers, and instructions that access it.
    """

    kernel: str
    target: str
    dtype: str
    config: dict[str, object]
    fixed: dict[str, object]
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    loads: int
    wide_loads: int
    tensor_core: dict[str, int]


def variants() -> Iterator[Variant]:
    """All variants of ``GUESSES``; those of a GPU's table ran when they were measured."""
    reads = PLAIN, GATHERED
    for target, dtype in product(TARGETS, GUESSES):
        for config in GUESSES[dtype]:
            if config.launch == "one":
                yield from (Variant("shrink_expand", dtype, config, r, target) for r in reads)
            elif config.launch == "two" or target in EARLY_TARGETS:
                yield from (Variant("shrink", dtype, config, r, target) for r in reads)
                yield Variant("expand", dtype, config, None, target)


def compile_all() -> list[Compiled]:
    """Compile all variants, with one process for every core."""
    # Spawned: a fork of a process with threads may hang.
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, variants()))


def compile_one(variant: Variant) -> Compiled:
    """Compile a variant as the launch in launch.py would, and count what the binary holds.

    Raises:
        RuntimeError: Triton runs its interpreter in this process.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set; unset it to compile")
    kernel = getattr(kernels, variant.kernel)
    fixed = variant.fixed | {"WIDEN": False}
    launch = {name: value for name, value in fixed.items() if not name.isupper()}
    signature, attributes = {}, {}
    # Without splits, the sums are written to z itself.
    split = {"sums_ptr": "fp32"} if fixed.get("SPLITS", 1) != 1 else {}
    pointers = _POINTERS | split
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, _TYPES[variant.dtype])
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"  # never specialised: kernels._CALL_SIZES
    constants = {name: value for name, value in fixed.items() if name in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=TARGETS[variant.target].gpu, options=launch)
    return _read(variant, binary)


def _read(variant: Variant, binary: Any) -> Compiled:
    target = TARGETS[variant.target]
    if target.gpu.backend == "cuda":
        registers, stack, instructions = _nvidia(binary.asm["cubin"])
    else:
        registers, stack, instructions = _amd(binary.asm["amdgcn"])

    def count(pattern: str) -> dict[str, int]:
        return {n: times for n, times in sorted(instructions.items()) if re.match(pattern, n)}

    dtype = str(variant.dtype).removeprefix("torch.")
    return Compiled(
        kernel=variant.kernel,
        target=variant.target,
        dtype=dtype,
        config=asdict(variant.config),
        fixed={"dtype": dtype, **variant.fixed},
        registers=registers,
        shared_bytes=binary.metadata.shared,
        stack_bytes=stack,
        spills=sum(count(target.spill).values()),
        loads=sum(count(target.load).values()),
        wide_loads=sum(count(target.wide_load).values()),
        tensor_core=count(target.tensor_core),
    )


def _nvidia(cubin: bytes) -> tuple[int, int, Counter[str]]:
    """Registers, bytes of stack, and the count of each instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _output(triton.knobs.nvidia.nvdisasm.path, "--print-code", file.name)
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return int(numbers["REG"]), int(numbers["STACK"]), Counter(_SASS.findall(code))


def _amd(code: str) -> tuple[int, int, Counter[str]]:
    numbers = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", code))
    stack = int(numbers["private_segment_fixed_size"])
    return int(numbers["vgpr_count"]), stack, Counter(_AMDGCN.findall(code))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Compile, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    found = compile_all()
    print("kernel         dtype     rows  read  target  registers  shared  spills  wide  matrix")
    for one in found:
        matrix = ", ".join(f"{times} {name}" for name, times in one.tensor_core.items()) or "none"
        print(
            f"{one.kernel:14} {one.dtype:9} {one.config['rows'] or 'any':>4}  "
            f"{one.fixed.get('READ', '')!s:4}  {one.target:6}  {one.registers:9}  "
            f"{one.shared_bytes:6}  {one.spills:6}  {one.wide_loads:4}  {matrix}"
        )
    if arguments.json:
        report = {
            "triton": triton.__version__,
            "ptxas": triton.knobs.nvidia.ptxas.version,
            "shared_limit_bytes": {name: one.shared_limit for name, one in TARGETS.items()},
            "kernels": [asdict(one) for one in found],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
