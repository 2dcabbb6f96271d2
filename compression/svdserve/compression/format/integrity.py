"""SHA256SUMS: the digests of a checkpoint's files, in the format of ``sha256sum``.

Headers reveal a truncated file, but only a digest reveals a flipped bit in a weight. svdserve
writes the digests when a checkpoint is finished; ``svdserve inspect --verify`` and
``sha256sum --check`` read them. The log and the model card have no digest, since users may edit
them.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from svdserve.compression.format.untrusted import check_entries
from svdserve.compression.system.errors import UserError

SUMS_FILE = "SHA256SUMS"
_SAMPLES, _SAMPLE_BYTES = 256, 4096
_EDITABLE = ("README.md", "svdserve_log.jsonl", SUMS_FILE)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of names, sizes and evenly spaced samples of files, in hexadecimal.

    It distinguishes a model from another model or from its own fine-tune without reading all of it.
    It does not detect forged files or flipped bits.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(index * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def write_sums(directory: Path) -> None:
    """Write the digests of all files of ``directory``, and sync every file to disk."""
    lines = []
    for name in _names(directory):
        with (directory / name).open("rb") as file:
            if name not in _EDITABLE:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                lines.append(f"{digest}  {name}\n")
            os.fsync(file.fileno())
    with (directory / SUMS_FILE).open("w") as sums:
        sums.writelines(lines)
        sums.flush()
        os.fsync(sums.fileno())


def _names(directory: Path) -> list[str]:
    """Relative paths of the files of a directory and of its folders that are not hidden."""
    paths = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    hidden = [path for path in paths if any(part.startswith(".") for part in path.parts[:-1])]
    return sorted(path.as_posix() for path in set(paths) - set(hidden))


def verify(directory: Path) -> int:
    """Compare the files of a checkpoint with its digests.

    Returns:
        The number of files, all of which have their digest.

    Raises:
        UserError: there are no digests, or a file is missing, changed or not listed; the message
            names the file.
    """
    check_entries(directory)
    sums = directory / SUMS_FILE
    if not sums.is_file():
        raise UserError(
            f"{directory}: has no {SUMS_FILE}, so it cannot be verified; copy the whole checkpoint"
        )
    entries = [line.partition("  ") for line in sums.read_text(errors="replace").splitlines()]
    present = set(_names(directory))
    for digest, _, name in entries:
        if name not in present:
            raise UserError(
                f"{sums}: {name or 'a line'} names no file of the directory; copy it again"
            )
        if file_sha256(directory / name) != digest:
            raise UserError(
                f"{directory / name}: does not have the digest of {SUMS_FILE}; it is damaged or "
                "was edited: copy or compress it again"
            )
    listed = {name for _, _, name in entries}
    for name in sorted(present - listed):
        if "/" not in name and name.endswith((".safetensors", ".json")):
            raise UserError(f"{directory / name}: is not listed in {SUMS_FILE}; remove the file")
    return len(entries)
