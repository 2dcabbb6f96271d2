"""The fused low-rank linear for x86 processors with AVX512-BF16, and AMX if they have it.

The library (cpu_bf16.cpp) is compiled once, at first use (``make install`` is one), into the folder
where torch keeps its extensions. Where it cannot be used ``unsupported`` says why, and callers run
the two products on their own.
"""

import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from svdserve.kernels.parts import Activation, PreparedFactors

SOURCE = Path(__file__).with_name("cpu_bf16.cpp")
HEADERS = tuple(SOURCE.with_name(f"cpu_{name}.h") for name in ("activation", "multiply"))
FLAGS = ("-O3", "-std=c++20", "-fopenmp")
ISA = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mavx512vbmi2", "-mpopcnt")
NEEDED = ("avx512_bw", "avx512_vl", "avx512_bf16", "avx512_vbmi2")
_WORD = 32  # channels in one word of the mask
_LANES = 16  # rows of gate, then of up, in the packed C of a gated layer
_ACTIVATIONS: tuple[Activation | None, ...] = (None, "silu", "gelu_tanh")  # cpu_activation.h


class PackedFactors(PreparedFactors):
    """y = C (x[pivots] + Z x[rest]) + b, or y = U (V x) + b, with the factors packed for the op.

    With an activation, y = act(gate) * up of the two halves of that.

    Attributes:
        stored_bytes: of the factors before packing, which pads rows to multiples of 16.
    """

    packed_in: Tensor
    packed_out: Tensor
    mask: Tensor

    def __init__(
        self,
        factor_in: Tensor,
        factor_out: Tensor,
        pivots: Tensor | None = None,
        *,
        activation: Activation | None = None,
        amx: bool | None = None,
    ) -> None:
        """Copy the factors; the caller may free its own.

        Args:
            factor_in: [r, n], or [r, n - r] with pivots; bfloat16 on CPU.
            factor_out: [m, r]; bfloat16 on CPU.
            pivots: [r] strictly ascending channels of x, or None for the pair layout.
            activation: where the rows of factor_out are gate and up, m / 2 of each.
            amx: whether to multiply with AMX; None takes it where the processor has it.

        Raises:
            ValueError: shapes, dtypes or pivots that do not fit together.
            RuntimeError: ``unsupported()`` says why.
        """
        super().__init__()
        rows, self.rank = factor_out.shape
        self.outputs = rows // 2 if activation else rows
        self.pivots = 0 if pivots is None else len(pivots)
        self.channels = self.pivots + factor_in.shape[1]
        _check(factor_in, factor_out, pivots, self.channels)
        if reason := unsupported():
            raise RuntimeError(f"the fused kernel cannot run: {reason}")
        self.amx: bool = torch.ops.svdserve.has_amx() if amx is None else amx
        pack = torch.ops.svdserve.pack
        self.register_buffer("packed_in", pack(factor_in), persistent=False)
        outer = _interleaved(factor_out) if activation else factor_out
        self.register_buffer("packed_out", pack(outer), persistent=False)
        self.register_buffer("mask", _mask(pivots, self.channels), persistent=False)
        self.stored_bytes = factor_in.nbytes + factor_out.nbytes
        # A small layer costs a few microseconds; looking all this up on every call would double it.
        self._activation = _ACTIVATIONS.index(activation)
        self._operation = torch.ops.svdserve.lowrank.default
        self._operands = (
            *(self.packed_in, self.packed_out, self.mask),
            *(self.pivots, self.rank, self.outputs),
        )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., m] of x [..., n], bfloat16 on CPU; bias [m] or None.

        With an activation, y [..., m / 2] and no bias.
        """
        return self._operation(  # type: ignore[no-any-return]
            x, *self._operands, bias, self._activation, self.amx
        )


@cache
def unsupported() -> str | None:
    """Why this process cannot use the kernel; None if it can, and then it is loaded."""
    has = torch.cpu.get_capabilities()
    if lacking := [name for name in NEEDED if not has.get(name)]:
        return f"this processor has no {', '.join(lacking)}"
    try:
        torch.ops.load_library(library())  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        return f"{SOURCE.name} did not compile: {error}"
    torch.library.register_fake("svdserve::lowrank", _fake)
    return None


def library() -> Path:
    """The compiled library; compiled now where it is missing or older than its source."""
    sources = b"".join(file.read_bytes() for file in (SOURCE, *HEADERS))
    digest = hashlib.sha256(sources + repr((FLAGS, ISA, torch.__version__)).encode())
    root = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions")
    library = Path(root) / f"svdserve_cpu_{digest.hexdigest()[:16]}.so"
    if not library.exists():
        _compile(library)
    return library


def _compile(library: Path) -> None:
    """Raises OSError without a compiler or a writable folder, RuntimeError if it reports errors."""
    from torch.utils.cpp_extension import include_paths, library_paths

    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [os.environ.get("CXX", "c++"), *FLAGS, *ISA, "-fPIC", "-shared", str(SOURCE)]
        # As needed: -fopenmp adds the compiler's OpenMP library last, where torch brings none.
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
        built.replace(library)  # at once: several workers may compile at the same time


def openmp_libraries() -> list[Path]:
    """Torch's own OpenMP library, if it brings one; a second one would compete for the cores."""
    package = Path(torch.__file__).parent
    folders = (package.parent / "torch.libs", package / "lib")
    return [path for folder in folders for path in folder.glob("libgomp*.so*")][:1]


def _check(factor_in: Tensor, factor_out: Tensor, pivots: Tensor | None, channels: int) -> None:
    rank = factor_out.shape[1]
    if factor_in.shape[0] != rank or rank == 0 or (pivots is not None and len(pivots) != rank):
        given = [list(f.shape) for f in (factor_in, factor_out, pivots) if f is not None]
        raise ValueError(
            f"factor_in, factor_out and pivots are {given}; expected [r, n], [m, r], or with "
            "pivots [r, n - r], [m, r], [r]"
        )
    for factor in (factor_in, factor_out):
        if factor.dtype != torch.bfloat16 or factor.device.type != "cpu":
            raise ValueError(f"a factor is {factor.dtype} on {factor.device}; expected bfloat16")
    if pivots is not None and not (
        int(pivots[0]) >= 0 and int(pivots[-1]) < channels and bool((pivots.diff() > 0).all())
    ):
        raise ValueError(f"pivots must ascend strictly within 0 .. {channels - 1}")


def _interleaved(factor_out: Tensor) -> Tensor:
    """Rows of gate and up [m / 2, r] each by turns, 16 at a time; the last ones padded with 0."""
    halves = factor_out.chunk(2)
    padding = -len(halves[0]) % _LANES
    blocks = (-1, _LANES, factor_out.shape[1])
    padded = [pad(half, (0, 0, 0, padding)).reshape(blocks) for half in halves]
    return torch.stack(padded, dim=1).flatten(0, 2)


def _mask(pivots: Tensor | None, channels: int) -> Tensor:
    """One bit for each channel, set for pivots; 32 in an int32, the lowest bit first."""
    bits = torch.zeros(-(-channels // _WORD), _WORD, dtype=torch.int64)
    if pivots is not None:
        bits.view(-1)[pivots.long()] = 1
    words = (bits << torch.arange(_WORD)).sum(dim=1)
    return words.to(torch.int32)  # wraps: only the bits count


def _fake(
    x: Tensor,
    packed_in: Tensor,
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
