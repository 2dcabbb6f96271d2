"""Logs without the paths of this machine: of each, its last part is kept.

vLLM logs its arguments, the model's path and those of its caches among them, in every process.
Serving, `svdserve serve` changes how all of them make log records; other programs that import vLLM
are left alone, as is what a process prints past the log (python's own last words when it dies).
"""

import logging
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

VARIABLE = "SVDSERVE_SHORT_PATHS"
"""Set by serve() for the processes below the server; plugin.py reads it in each."""

_PATH = re.compile(r"(?<![\w.~-])/+(?P<first>[^\s/'\"]+)(?:/+[^\s/'\"<>|,;:()\[\]{}]+)+")
_PACKAGES = "/site-packages/"
_ACCESS = "uvicorn.access"  # Its formatter needs the arguments, and they hold routes, not paths.


def shorten_paths() -> None:
    """Make every log record of this process from now on without paths; safe to call repeatedly."""
    make = logging.getLogRecordFactory()
    if not isinstance(make, _Shortened):
        logging.setLogRecordFactory(_Shortened(make))
        logging.captureWarnings(True)


def shortened(text: str) -> str:
    """``text`` with every absolute path cut to its last part, or to what is in site-packages.

    A path is what starts with a directory that this machine has at its root: /v1/models is none.
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
    """A factory of log records around another one."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*args, **kwargs)
        if record.name == _ACCESS:
            return record
        if record.exc_info and record.exc_info[0] is not None:
            # A formatter takes this text in place of its own.
            record.exc_text = shortened(logging.Formatter().formatException(record.exc_info))
        try:
            message = record.getMessage()
        except Exception:
            return record  # The handler reports what is wrong with it.
        if (short := shortened(message)) != message:
            record.msg, record.args = short, ()
        return record
