"""`svdserve` as a user runs it: a process, its two streams and its exit code."""

import os
import subprocess
import sys
from pathlib import Path


def svdserve(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "svdserve.cli.main", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "160", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=300
    )
