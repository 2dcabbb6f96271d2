"""Files that are whole or not there, and one job at a time for what a job writes.

A file is written under a name that no other process uses, forced to the disk and renamed; then the
folder is forced too, so that the rename survives a power cut.
"""

import json
import os
import secrets
import socket
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdserve.compression.errors import UserError

try:
    import fcntl
except ImportError:  # no POSIX: jobs are not kept apart there
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = ".svdserve-tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file at the path that this gives, and it replaces ``path`` in one step.

    Nothing is left behind if the block raises.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}{_TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write JSON in one step."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def remove_temporaries(folder: Path) -> None:
    """Remove what killed runs have left in a folder that nobody else writes now."""
    for path in folder.rglob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """While inside, no other process of any user is inside for the same ``path``.

    The lock is ``.NAME.lock`` beside ``path``, taken with flock: the kernel releases it when the
    process ends in whatever way. On NFS it needs a server that locks; without one the jobs of two
    machines are not kept apart.

    Args:
        path: what the caller is about to write; it need not exist, but its folder must.
        wait: for the other process to end, with a line on stderr, instead of failing.

    Raises:
        UserError: another process is inside, and ``wait`` is off.
    """
    if fcntl is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _acquire(descriptor, path, wait)
            # The process before may have removed the file that was opened here.
            if _same_file(descriptor, lock):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        if not wait:
            raise UserError(
                f"{path}: {owner} is writing it now; wait until that ends, or give another folder"
            ) from None
        print(f"{path}: waiting for {owner}", file=sys.stderr)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def check_output(out: Path, inputs: Collection[Path] = ()) -> None:
    """Find out before a long job whether a directory and what stands beside it can be written.

    Args:
        out: the directory; its folder may be missing.
        inputs: directories and files that the job reads. Those that do not exist are passed over.

    Raises:
        UserError: ``out`` names no directory of its own, holds an input or lies in one, or cannot
            be made.
    """
    if out.name in ("", "..") or "\0" in str(out):
        raise UserError(f"{str(out)!r}: names no new directory; give one, such as models/small")
    beside = [out, *(out.with_name(out.name + end) for end in OUTPUT_SUFFIXES)]
    check_writable(beside[-1])
    taken = [path.resolve() for path in beside]
    for given in inputs:
        read = given.resolve()
        if not read.exists():
            continue
        for path, written in zip(beside, taken, strict=True):
            if written == read or written in read.parents:
                raise UserError(
                    f"{path}: holds {given}, which this command reads; give another folder"
                )
    if Path.cwd() == taken[0] or taken[0] in Path.cwd().parents:
        raise UserError(f"{out}: the command was started in it; give another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a directory to write")


def check_writable(path: Path) -> None:
    """Raise UserError unless a file or folder of this path can be made."""
    try:
        path.exists()  # too long a name
        folder = next(parent for parent in path.absolute().parents if parent.exists())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be written ({_reason(error)}); give another path"
        ) from None
    if not folder.is_dir():
        raise UserError(f"{path}: {folder} is a file; give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {folder} may not be written; give another path")


def check_result_files(files: Collection[Path | None], inputs: Collection[Path] = ()) -> None:
    """Find out before a long job whether its results can be written.

    Raises:
        UserError: one is a folder or an input, or its folder cannot be made.
    """
    for file in files:
        if file is None:
            continue
        check_writable(file)
        if file.is_dir():
            raise UserError(f"{file}: is a folder; give a file to write")
        if any(given.exists() and file.resolve() == given.resolve() for given in inputs):
            raise UserError(f"{file}: is read by this command; give another file to write")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; UserError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({_reason(error)}); give another path") from None


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


OUTPUT_SUFFIXES = (".replaced", ".search", ".partial", ".partial.done")
"""What a job makes beside its output, and removes."""
