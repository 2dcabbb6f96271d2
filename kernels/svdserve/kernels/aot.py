"""Compile every configuration of the Triton kernels for GPUs that need not be there.

``python -m svdserve.kernels.aot --json results/triton_kernels.json`` writes what the compiler and
the disassembler say: registers, spills, shared memory, 128-bit loads, tensor-core instructions.
Needs Triton, which brings NVIDIA's ptxas, cuobjdump and nvdisasm, and no GPU.
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
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svdserve.kernels import triton_kernels as kernels
from svdserve.kernels.triton_linear import CONFIGS, Config, compile_options, interpreted

# Most shared memory of one block in KiB: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability".
SHARED_KIB = {80: 163, 90: 227, 100: 227}
# In SASS: HMMA is mma.sync, HGMMA is wgmma, UTC.MMA is tcgen05.mma.
_TENSOR = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
_LOAD = re.compile(r"LDG(STS)?\b")
_WIDE_LOAD = re.compile(r"(LDG|LDGSTS)\.(\w+\.)*128")
_LOCAL = re.compile(r"(LDL|STL)\b")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_POINTERS = {"channels_ptr": "i32", "pivots_ptr": "i32", "groups_ptr": "i32", "counters_ptr": "i32"}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled at run time, for one compute capability (80 is sm_80)."""

    kernel: str
    dtype: torch.dtype
    config: Config
    gather: bool | None
    capability: int

    @property
    def fixed(self) -> dict[str, object]:
        """The arguments that are known when it is compiled."""
        gather = {} if self.gather is None else {"GATHER": self.gather}
        return compile_options(self.config, self.dtype) | gather


@dataclass(frozen=True)
class Compiled:
    """What became of a variant; memory in bytes, instructions counted in the code.

    Attributes:
        fixed: dtype and compile-time arguments of the launch.
        loads, wide_loads: instructions that read global memory; those of 128 bits.
        local_instructions: reads and writes of local memory, which is where registers spill to.
    """

    kernel: str
    capability: int
    dtype: str
    config: dict[str, object]
    fixed: dict[str, object]
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_instructions: int
    loads: int
    wide_loads: int
    tensor_core: dict[str, int]


def variants() -> Iterator[Variant]:
    """Everything that triton_linear.py can launch."""
    for capability in SHARED_KIB:
        for dtype, configs in CONFIGS.items():
            for config in configs:
                if config.single_launch:
                    yield Variant("shrink_expand", dtype, config, None, capability)
                else:
                    yield Variant("shrink", dtype, config, True, capability)
                    yield Variant("shrink", dtype, config, False, capability)
                    yield Variant("expand", dtype, config, None, capability)


def compile_all() -> list[Compiled]:
    """Compile all variants, with one process for every core."""
    # Spawned: a fork of a process with threads may hang.
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, variants()))


def compile_one(variant: Variant) -> Compiled:
    """Compile a variant to a cubin, as the launch in triton_linear.py would, and read it.

    Raises:
        RuntimeError: Triton runs its interpreter in this process.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set; unset it to compile")
    kernel = getattr(kernels, variant.kernel)
    fixed = variant.fixed | {"WIDEN": False}
    launch = {name: value for name, value in fixed.items() if name not in kernel.arg_names}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + _POINTERS.get(name, _TYPES[variant.dtype])
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"  # never specialised: triton_kernels._CALL_SIZES
    constants = {name: value for name, value in fixed.items() if name in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", variant.capability, 32)
    binary = triton.compile(source, target=target, options=launch)
    return _read(variant, binary)


def _read(variant: Variant, binary: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _output(triton.knobs.nvidia.nvdisasm.path, "--print-code", file.name)
    instructions = Counter(_INSTRUCTION.findall(code))

    def count(pattern: re.Pattern[str]) -> int:
        return sum(times for name, times in instructions.items() if pattern.match(name))

    numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    dtype = str(variant.dtype).removeprefix("torch.")
    return Compiled(
        kernel=variant.kernel,
        capability=variant.capability,
        dtype=dtype,
        config=asdict(variant.config),
        fixed={"dtype": dtype, **variant.fixed},
        registers=int(numbers["REG"]),
        shared_bytes=binary.metadata.shared,
        stack_bytes=int(numbers["STACK"]),
        local_instructions=count(_LOCAL),
        loads=count(_LOAD),
        wide_loads=count(_WIDE_LOAD),
        tensor_core={n: times for n, times in sorted(instructions.items()) if _TENSOR.match(n)},
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Compile, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    found = compile_all()
    print(
        "kernel         dtype     rows  gather  sm   registers  shared  spills  wide  tensor core"
    )
    for one in found:
        cores = ", ".join(f"{times} {name}" for name, times in one.tensor_core.items()) or "none"
        print(
            f"{one.kernel:14} {one.dtype:9} {one.config['rows'] or 'any':>4}  "
            f"{one.fixed.get('GATHER', '')!s:6}  "
            f"{one.capability:<3}  {one.registers:9}  {one.shared_bytes:6}  "
            f"{one.local_instructions:5}  {one.wide_loads:4}  {cores}"
        )
    if arguments.json:
        report = {
            "triton": triton.__version__,
            "ptxas": triton.knobs.nvidia.ptxas.version,
            "shared_limit_bytes": {sm: kib * 1024 for sm, kib in SHARED_KIB.items()},
            "kernels": [asdict(one) for one in found],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
