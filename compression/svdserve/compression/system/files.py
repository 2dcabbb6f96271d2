"""Atomic writes, a lock for each output, and checks of output paths before a long job.

A file is written under a name that no other process uses, synced to disk and renamed; then its
folder is synced too, so that the rename survives a power cut.
"""

import json
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from svdserve.compression.system.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock, so jobs are not kept apart there
    fcntl = None  # type: ignore[assignment]

OUTPUT_SUFFIXES = (".replaced", ".search", ".partial", ".partial.done")
"""Suffixes of the temporary files and folders that a job makes beside its output."""
_TEMPORARY = ".svdserve-tmp"
_ZEROS = bytes(1 << 20)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file written there replaces ``path`` when the block ends.

    The temporary file is removed if the block raises. Where ``path`` is a link or a device, such as
    /dev/stdout, the block writes to ``path`` itself.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}{_TEMPORARY}")
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


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_results(file: Path, value: Any) -> None:
    """Write a command's results as JSON; makes the folder if it is missing."""
    make_folder(file.parent)
    write_json(file, value)


def remove_temporaries(folder: Path, names: str = "*") -> None:
    """Remove the temporary files that killed runs have left in a folder.

    The caller makes sure that no other process is writing there. ``names`` is a pattern for the
    files; ``**/*`` includes subfolders.
    """
    above, _, last = names.rpartition("/")
    for path in folder.glob(f"{above}/.{last}{_TEMPORARY}" if above else f".{last}{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, on systems that can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):  # some network file systems cannot
        os.fsync(descriptor)
    os.close(descriptor)


def reserve(file: IO[bytes], size: int) -> None:
    """Allocate ``size`` bytes on disk for an empty file, so that later writes find room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, len(_ZEROS)):
        file.write(_ZEROS[: size - start])
    file.flush()


@contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock on ``path`` that excludes the processes of all users.

    The lock is an flock on the file ``.NAME.lock`` beside ``path``. The kernel releases it when the
    process ends for any reason, so a lock file that a killed process leaves behind blocks no one.
    NFS needs a server that supports locks. Without such a server, and on systems without flock,
    processes are not kept apart.

    Args:
        path: what the caller is about to write; it need not exist, but its folder must.
        wait: print a line to stderr and wait for the other process, instead of failing.

    Raises:
        UserError: another process holds the lock and ``wait`` is False, or the lock file cannot be
            made.
    """
    if fcntl is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(
                f"{lock}: cannot be made ({error.strerror}); give a folder of your own"
            ) from None
        try:
            _acquire(descriptor, path, wait)
            # The previous holder may have removed the file that this process has opened.
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
    """Check before a long job that its output directory and temporary files can be written.

    Args:
        out: the directory; its parent may be missing.
        inputs: directories and files that the job reads; missing ones are ignored.

    Raises:
        UserError: ``out`` is no name of a new directory, cannot be made, or is, contains or lies in
            an input.
    """
    if out.name in ("", "..") or "\0" in str(out):
        raise UserError(f"--out {str(out)!r}: names no new directory; give one like models/small")
    beside = [out, *(out.with_name(out.name + end) for end in OUTPUT_SUFFIXES)]
    for path in beside:
        check_writable(path)
        for given in inputs:
            check_apart(path, given)
    if _identity(out) in _identities(Path.cwd()):
        raise UserError(f"{out}: is or contains the current directory; give another directory")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a directory to write")
    if os.path.ismount(out):
        raise UserError(f"{out}: is a mount point, which cannot be replaced; give a folder in it")


def check_apart(written: Path, read: Path) -> None:
    """Raise UserError if the folder ``written`` is, contains or lies in ``read``.

    Folders are compared by device and inode, so links and bind mounts do not hide an overlap.
    """
    if "\0" in str(read) or not os.path.exists(read):
        return
    inside = _identity(written) in _identities(read)
    if inside or _identity(read) in _identities(written):
        how = "is or contains" if inside else "lies in"
        raise UserError(f"{written}: {how} {read}, which this command reads; give another folder")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _identities(path: Path) -> set[tuple[int, int]]:
    """Device and inode of a path and of each folder above it, if it exists."""
    real = path.resolve()
    return {found for one in (real, *real.parents) if (found := _identity(one)) is not None}


def check_writable(path: Path) -> None:
    """Raise UserError unless a file or folder can be made at this path."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # fails for names that are too long, NUL bytes and loops of links
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        folder = folder.resolve(strict=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({reason(error)}); give another path") from None
    if not folder.is_dir():
        raise UserError(f"{path}: {folder} is a file; give another path")
    try:
        with tempfile.TemporaryFile(dir=folder):  # access(2) does not see every refusal
            pass
    except OSError as error:
        raise UserError(
            f"{path}: {folder} may not be written ({reason(error)}); give another path"
        ) from None


def check_result_files(files: Collection[Path | None], inputs: Collection[Path] = ()) -> None:
    """Check before a long job that its results can be written; makes their folders.

    Args:
        files: the files to write; None is ignored.
        inputs: files that the job reads.

    Raises:
        UserError: a file to write is a folder or an input, or cannot be written.
    """
    for file in filter(None, files):
        if file.name in ("", "..") or file.is_dir():
            raise UserError(f"{str(file)!r}: is a folder; give a file to write")
        if file.exists() and not file.is_file():
            continue  # such as /dev/stdout
        check_writable(file)
        if any(_identity(given) == _identity(file) is not None for given in inputs):
            raise UserError(f"{file}: is read by this command; give another file to write")
        make_folder(file.parent)


def check_folder(folder: Path) -> None:
    """Make a folder for a job's files; UserError unless files can be made in it."""
    make_folder(folder)
    check_writable(folder / "file")


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be made ({reason(error)}); give another path") from None


def reason(error: Exception) -> str:
    """The message of an error, without the error number and path of an OSError."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
