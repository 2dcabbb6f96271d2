"""Compiles and loads the C++ operation.

The library (bf16.cpp and int8.cpp) is compiled once, at first use or by ``make install``, into the
folder where torch keeps its extensions. If it cannot be used, ``unsupported`` says why, and callers
compute the two products without it.
"""

import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "bf16.cpp", FOLDER / "int8.cpp")
FLAGS = ("-O3", "-std=c++20", "-fopenmp")
ISA = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mavx512vbmi2", "-mavx512vnni")
NEEDED = ("avx512_bw", "avx512_vl", "avx512_bf16", "avx512_vbmi2", "avx512_vnni")


@cache
def unsupported() -> str | None:
    """Why this process cannot use the kernel; None if it can, and then it is loaded."""
    has = torch.cpu.get_capabilities()
    if lacking := [name for name in NEEDED if not has.get(name)]:
        return f"this processor has no {', '.join(lacking)}"
    try:
        torch.ops.load_library(library())  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        return f"the C++ sources did not compile: {error}"
    torch.library.register_fake("svdserve::lowrank", _fake)
    torch.library.register_fake("svdserve::lowrank_int8", _fake_int8)
    return None


def library() -> Path:
    """The path of the library, which is compiled now if none exists for this source and torch.

    Raises:
        OSError: there is no compiler, or no folder that this process may write to.
        RuntimeError: the compiler reports errors.
    """
    files = sorted((*SOURCES, *FOLDER.glob("*.h")))
    sources = b"".join(file.read_bytes() for file in files)
    digest = hashlib.sha256(sources + repr((FLAGS, ISA, torch.__version__)).encode())
    root = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions")
    library = Path(root) / f"svdserve_cpu_{digest.hexdigest()[:16]}.so"
    if not library.exists():
        _compile(library)
    return library


def _compile(library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [os.environ.get("CXX", "c++"), *FLAGS, *ISA, "-mpopcnt", "-fPIC", "-shared"]
        command += map(str, SOURCES)
        # -fopenmp adds the compiler's OpenMP library last; --as-needed drops it if torch has one.
        command += [
            "-o",
            str(built),
            "-Wl,--as-needed",
            *map(str, openmp_libraries()),
            "-lc10",
            "-ltorch_cpu",
        ]
        command += [f"-isystem{path}" for path in include_paths()]
        command += [f"-L{path}" for path in library_paths()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip() or f"{command[0]} failed")
        built.replace(library)  # atomic, as several workers may compile at the same time


def openmp_libraries() -> list[Path]:
    """Torch's own OpenMP library if it has one; a second library would compete for the cores."""
    package = Path(torch.__file__).parent
    folders = (package.parent / "torch.libs", package / "lib")
    return [path for folder in folders for path in folder.glob("libgomp*.so*")][:1]


def _fake(
    x: Tensor,
    packed_in: Tensor | None,
    packed_out: Tensor,
    mask: Tensor,
    pivots: int,
    rank: int,
    outputs: int,
    bias: Tensor | None,
    activation: int,
    amx: bool,
) -> Tensor:
    del packed_in, packed_out, mask, pivots, rank, bias, activation, amx
    return x.new_empty(*x.shape[:-1], outputs)


def _fake_int8(
    x: Tensor,
    packed_in: Tensor | None,
    scale_in: Tensor | None,
    packed_out: Tensor,
    scale_out: Tensor,
    mask: Tensor,
    pivots: int,
    rank: int,
    outputs: int,
    bias: Tensor | None,
    activation: int,
    amx: bool,
) -> Tensor:
    del scale_in, scale_out
    return _fake(x, packed_in, packed_out, mask, pivots, rank, outputs, bias, activation, amx)
