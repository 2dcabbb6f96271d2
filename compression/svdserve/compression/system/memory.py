"""Memory of this process: what it has used, and giving back what it does not use."""

import ctypes
import os
import resource
import sys
from pathlib import Path

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def peak_bytes() -> int:
    """Peak resident memory of this process so far.

    Linux counts it anew for every program; the portable ru_maxrss, in KiB, would also count the
    process that started this one, up to that moment.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    if found:
        return found[0] * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release() -> None:
    """Return freed heap pages to the system.

    The allocator keeps the many tensors of a few megabytes that each block leaves behind, in
    fragments that the next block cannot always use; without this the peak grows with the depth.
    """
    if _TRIM is not None:
        _TRIM(0)


def bound_kernel_cache() -> None:
    """Keep compiled kernels of few shapes; effective before the first product of the process.

    oneDNN keeps those of 1,024, and every rank is a shape of its own: without this the peak grows
    with the depth.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
