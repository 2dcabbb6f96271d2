"""Logs without the paths of this machine: only the last part of each path is kept.

vLLM logs its arguments in every process, with the paths of the model and of its caches. `svdserve
serve` changes how all of its processes make log records. Other programs that import vLLM are left
alone, and so is output that bypasses the log, such as the traceback that Python prints when it
exits.
"""

import logging
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

SHORT_PATHS = "SVDSERVE_SHORT_PATHS"
"""The environment variable that serve() sets for its child processes; plugin.py reads it."""

_PATH = re.compile(r"(?<![\w.~-])/+(?P<first>[^\s/'\"]+)(?:/+[^\s/'\"<>|,;:()\[\]{}]+)+")
_PACKAGES = "/site-packages/"
_ACCESS = "uvicorn.access"  # its formatter needs the arguments, which hold routes, not paths


def shorten_paths() -> None:
    """Shorten the paths in every later log record of this process; safe to call repeatedly."""
    make = logging.getLogRecordFactory()
    if not isinstance(make, _Shortened):
        logging.setLogRecordFactory(_Shortened(make))
        logging.captureWarnings(True)


def shortened(text: str) -> str:
    """``text`` with every absolute path cut to its last part, or to its part below site-packages.

    Only text that starts with a directory in this machine's root is a path, so /v1/models is not.
    """
    return _PATH.sub(_short, text) if "/" in text else text


def _short(found: re.Match[str]) -> str:
    if not _is_root_directory(found["first"]):
        return found[0]
    _, inside, rest = found[0].rpartition(_PACKAGES)
    return rest if inside else f".../{Path(found[0]).name}"


@lru_cache
def _is_root_directory(name: str) -> bool:
    return os.path.isdir(f"/{name}")


class _Shortened:
    """A factory of log records that wraps another factory."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*args, **kwargs)
        if record.name == _ACCESS:
            return record
        if record.exc_info and record.exc_info[0] is not None:
            # A formatter uses this text if it is set, and makes none of its own.
            record.exc_text = shortened(logging.Formatter().formatException(record.exc_info))
        try:
            message = record.getMessage()
        except Exception:
            return record  # the handler reports what is wrong with the record
        if (short := shortened(message)) != message:
            record.msg, record.args = short, ()
        return record
