"""Checks of model directories from untrusted sources.

Three things are refused before a byte of them is read: an entry that is neither a file nor a
folder (a pipe blocks its reader forever), a link that leads out of the directory, and a JSON file
above 100 MB. A snapshot in the Hub's cache links to the blobs beside it, which are allowed.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import reason
from svdserve.compression.system.permissions import links_allowed

MAX_JSON_BYTES = 100_000_000  # the limit of safetensors for its header
_MAX_ENTRIES = 100_000


def check_entries(directory: Path) -> None:
    """Check every entry of a model directory and of its folders.

    Raises:
        UserError: an entry leads out of the directory or is neither a file nor a folder, or there
            are more than 100,000 entries.
    """
    seen = 0
    for folder, folders, files in os.walk(directory):
        # svdserve reads no hidden folders, such as .git and the downloader's .cache.
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            check_entry(Path(folder, name), directory)
            seen += 1
            if seen > _MAX_ENTRIES:
                raise UserError(
                    f"{directory}: has more than {_MAX_ENTRIES:,} entries; give a directory that "
                    "holds one model and nothing else"
                )


def check_entry(path: Path, directory: Path) -> None:
    """Raise UserError unless ``path`` is a file or folder inside ``directory``."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            target = path.resolve(strict=True)
            inside = any(target.is_relative_to(root) for root in _roots(directory))
            if not inside and not links_allowed():
                raise UserError(
                    f"{path}: is a link out of its directory; put the file itself there, or add "
                    "--allow-links if you trust its target"
                )
            mode = target.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({reason(error)}); repair or remove it") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is neither a file nor a folder; remove it")


def _roots(directory: Path) -> list[Path]:
    """Folders that links may lead to: ``directory`` and, in the Hub's cache, its blobs."""
    real = directory.resolve()
    if real.parent.name != "snapshots":
        return [real]
    blobs = real.parent.parent / "blobs"
    # Only in the user's own cache may "blobs" be a link; elsewhere it could lead anywhere.
    own = real.is_relative_to(Path(HF_HUB_CACHE).resolve())
    return [real, blobs.resolve() if own else blobs]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: the file is missing, too large, not a JSON object, or a link out of its
            directory.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; give a Hugging Face model directory")
    check_entry(path, path.parent)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            limit = MAX_JSON_BYTES // 10**6
            raise UserError(f"{path}: is larger than {limit} MB; give the model's own file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({reason(error)}); give a model directory that you may read"
        ) from None
    except (ValueError, RecursionError) as error:  # also for long numbers and deep nesting
        raise UserError(f"{path}: is not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object; copy it again")
    return value
