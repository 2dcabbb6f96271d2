"""The log of a checkpoint, ``svdserve_log.jsonl``: one JSON object a line for each event."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svdserve.compression.format.untrusted import MAX_JSON_BYTES

LOG_FILE = "svdserve_log.jsonl"


def log_event(path: Path, kind: str, **fields: Any) -> None:
    """Append one event to a log, with the time in seconds since 1970."""
    with path.open("a") as log:
        log.write(json.dumps({"event": kind, "time": round(time.time(), 3), **fields}) + "\n")


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a log, which may be untrusted.

    Lines that are not JSON objects, and all lines beyond the first 100 MB, are ignored.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES)
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry
