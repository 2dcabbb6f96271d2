"""The peak is this program's own, and freed memory goes back."""

import subprocess
import sys

import psutil
import torch

from svdserve.compression.system.memory import peak_bytes, release

_CHILD = """
from svdserve.compression.system.memory import peak_bytes
before = peak_bytes()
block = bytearray(200_000_000)
print(before, peak_bytes())
"""


def test_peak_grows_with_use_and_starts_anew_in_every_program() -> None:
    ballast = torch.ones(100_000_000)  # 400 MB that a child must not inherit
    printed = subprocess.run(
        [sys.executable, "-c", _CHILD], check=True, capture_output=True, text=True
    ).stdout
    before, after = map(int, printed.split())
    assert before < ballast.nbytes
    assert 190_000_000 < after - before < 260_000_000
    assert peak_bytes() > ballast.nbytes


def test_release_returns_fragments() -> None:
    pieces = [torch.ones(8_000) for _ in range(10_000)]  # 320 MB below the mmap threshold
    keep = pieces[::100]
    full = psutil.Process().memory_info().rss
    del pieces
    release()
    assert psutil.Process().memory_info().rss < full - 200_000_000
    assert len(keep) == 100
