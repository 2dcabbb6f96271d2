"""Ends an interrupted job with one line that says how to go on, and with the usual exit code."""

import errno
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from svdserve.compression.system.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; no ``except Exception`` catches this class."""


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Run a job that writes ``out`` and keeps what is finished in ``OUT.partial``.

    SIGINT and SIGTERM end the process with 130 and 143, as a shell reports them.

    Raises:
        UserError: the disk is full.
    """
    arrived: list[int] = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        arrived.append(signum)
        raise Interrupted

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (Interrupted, Exception) as error:
        # Compiled code that is interrupted may raise an error of its own in place of Interrupted.
        if arrived:
            print(f"interrupted: {_how_to_go_on(out)}", file=sys.stderr)
            sys.exit(128 + arrived[0])
        if not isinstance(error, OSError | SafetensorError) or _error_number(error) not in _FULL:
            raise
        raise UserError(
            f"no space left to write {out}: free some space; {_how_to_go_on(out)}"
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how_to_go_on(out: Path) -> str:
    partial = out.with_name(f"{out.name}.partial")
    if (partial / "job.json").exists():
        return f"{partial} keeps what is finished, and the same command with --resume goes on"
    return "nothing is finished yet; run the same command again"


def _error_number(error: OSError | SafetensorError) -> int | None:
    """The operating system's number of an error, which safetensors gives in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
