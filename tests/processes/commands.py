"""`svdserve` as a user runs it: a process, its two streams and its exit code."""

import atexit
import os
import subprocess
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from zygote import listening


@cache
def _program() -> Path:
    """Shared by all tests of this process, and ended with it."""
    stack = ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="svdserve-"))
    return stack.enter_context(listening(Path(folder)))


def svdserve(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """In a fork of a process that has imported everything; tests/test_zygote.py compares."""
    command = [str(_program()), *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "160", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=300
    )
