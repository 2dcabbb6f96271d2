"""Memory of this process: what it has used, and giving back what it does not use."""

import ctypes
import resource
import sys

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def peak_bytes() -> int:
    """Peak resident memory of this process so far (Linux counts ru_maxrss in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release() -> None:
    """Return freed heap pages to the system.

    The allocator keeps the many tensors of a few megabytes that each block leaves behind, in
    fragments that the next block cannot always use; without this the peak grows with the depth.
    """
    if _TRIM is not None:
        _TRIM(0)
