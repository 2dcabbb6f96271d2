"""Memory of this process: its peak, and ways to keep the peak low."""

import ctypes
import os
import resource
import sys
from pathlib import Path

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def peak_bytes() -> int:
    """Peak resident memory of this process so far.

    Linux resets VmHWM when a program starts. The portable ru_maxrss also covers the memory that the
    parent process had when it started this one.
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

    Each block frees many tensors of a few megabytes, and the allocator keeps them in fragments that
    the next block cannot always reuse. Without this call the peak grows with the number of blocks.
    """
    if _TRIM is not None:
        _TRIM(0)


def bound_kernel_cache() -> None:
    """Limit oneDNN's cache of compiled kernels; call it before the first matrix product.

    By default oneDNN caches kernels for 1,024 shapes, and every rank r is a new shape. Without the
    limit the peak grows with the number of blocks.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
