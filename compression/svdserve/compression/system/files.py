"""Files that are whole or not there, one job at a time for what a job writes, and early refusals.

A file is written under a name that no other process uses, forced to the disk and renamed; then the
folder is forced too, so that the rename survives a power cut.
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
except ImportError:  # no POSIX: jobs are not kept apart there
    fcntl = None  # type: ignore[assignment]

OUTPUT_SUFFIXES = (".replaced", ".search", ".partial", ".partial.done")
"""What a job makes beside its output, and removes."""
_TEMPORARY = ".svdserve-tmp"
_ZEROS = bytes(1 << 20)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file at the path that this gives, and it replaces ``path`` in one step.

    Nothing is left behind if the block raises. Links and devices, such as /dev/stdout, are written
    through.
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
    """Write what a command has measured as JSON, into a folder that is made if it is not there."""
    make_folder(file.parent)
    write_json(file, value)


def remove_temporaries(folder: Path, names: str = "*") -> None:
    """Remove what killed runs have left in a folder, while nobody else writes such files there.

    ``names`` is a pattern for the files; ``**/*`` takes the folders in it as well.
    """
    above, _, last = names.rpartition("/")
    for path in folder.glob(f"{above}/.{last}{_TEMPORARY}" if above else f".{last}{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):  # some network file systems cannot
        os.fsync(descriptor)
    os.close(descriptor)


def reserve(file: IO[bytes], size: int) -> None:
    """Give an empty file ``size`` bytes that the disk has room for, and not only promises."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, len(_ZEROS)):
        file.write(_ZEROS[: size - start])
    file.flush()


@contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """While inside, no other process of any user is inside for the same ``path``.

    The lock is ``.NAME.lock`` beside ``path``, taken with flock: the kernel releases it when the
    process ends in whatever way, and the file that a kill leaves behind holds nobody up. On NFS it
    needs a server that locks; without one, and on systems without flock, nothing is kept apart.

    Args:
        path: what the caller is about to write; it need not exist, but its folder must.
        wait: for the other process to end, with a line on stderr, instead of failing.

    Raises:
        UserError: another process is inside, and ``wait`` is off; or the lock cannot be made.
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
        UserError: ``out`` names no directory of its own, is, holds or lies in an input, or cannot
            be made.
    """
    if out.name in ("", "..") or "\0" in str(out):
        raise UserError(f"--out {str(out)!r}: names no new directory; give one, as models/small")
    beside = [out, *(out.with_name(out.name + end) for end in OUTPUT_SUFFIXES)]
    for path in beside:
        check_writable(path)
        for given in inputs:
            check_apart(path, given)
    if _identity(out) in _identities(Path.cwd()):
        raise UserError(f"{out}: the command was started in it; give another directory")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a directory to write")
    if os.path.ismount(out):
        raise UserError(f"{out}: is a mount point, which cannot be replaced; give a folder in it")


def check_apart(written: Path, read: Path) -> None:
    """Raise UserError if a folder to write is, holds or lies in what the command reads.

    Links and bind mounts are seen through: what counts is the folder, not its name.
    """
    if "\0" in str(read) or not os.path.exists(read):
        return
    inside = _identity(written) in _identities(read)
    if inside or _identity(read) in _identities(written):
        how = "is or holds" if inside else "lies in"
        raise UserError(f"{written}: {how} {read}, which this command reads; give another folder")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _identities(path: Path) -> set[tuple[int, int]]:
    """Of a path and the folders above it, as far as they exist."""
    real = path.resolve()
    return {found for one in (real, *real.parents) if (found := _identity(one)) is not None}


def check_writable(path: Path) -> None:
    """Raise UserError unless a file or folder of this path is there or can be made."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # too long a name, a NUL byte, a loop of links
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        folder = folder.resolve(strict=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({reason(error)}); give another path") from None
    if not folder.is_dir():
        raise UserError(f"{path}: {folder} is a file; give another path")
    try:
        with tempfile.TemporaryFile(dir=folder):  # what access(2) says is not all that counts
            pass
    except OSError as error:
        raise UserError(
            f"{path}: {folder} may not be written ({reason(error)}); give another path"
        ) from None


def check_result_files(files: Collection[Path | None], inputs: Collection[Path] = ()) -> None:
    """Find out before a long job whether its results can be written; makes their folders.

    Args:
        files: to be written; None is passed over.
        inputs: files that the job reads.

    Raises:
        UserError: one is a folder or an input, or cannot be written.
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
    """Make a folder that a job keeps files in; UserError unless files can be made there."""
    make_folder(folder)
    check_writable(folder / "file")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; UserError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be made ({reason(error)}); give another path") from None


def reason(error: Exception) -> str:
    """What the system says, without number and path."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
