"""Model directories come from strangers: what may be opened there, and how much is read as text.

Three things are refused before a byte of them is read: an entry that is neither a file nor a
folder (a pipe blocks its reader for ever), a link that leads out of the directory, and JSON that is
larger than any real one. A snapshot of the Hub's cache links to the blobs beside it; those count as
inside.
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
    """Check every entry of a model directory, folders in it included.

    Raises:
        UserError: names the entry that leads out of the directory or is no file.
    """
    seen = 0
    for folder, folders, files in os.walk(directory):
        # Nobody reads hidden folders, such as .git and the downloader's .cache.
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            check_entry(Path(folder, name), directory)
            seen += 1
            if seen > _MAX_ENTRIES:
                raise UserError(
                    f"{directory}: more than {_MAX_ENTRIES:,} entries; give a directory that "
                    "holds one model and nothing else"
                )


def check_entry(path: Path, directory: Path) -> None:
    """Raise UserError unless ``path`` is a file or folder that lies in ``directory``."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            target = path.resolve(strict=True)
            inside = any(target.is_relative_to(root) for root in _roots(directory))
            if not inside and not links_allowed():
                raise UserError(
                    f"{path}: is a link out of its directory; put the file itself there, or add "
                    "--allow-links if you trust where it leads"
                )
            mode = target.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({reason(error)}); repair or remove it") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is neither a file nor a folder; remove it")


def _roots(directory: Path) -> list[Path]:
    """Where links of ``directory`` may lead: into itself and, in the Hub's cache, to its blobs."""
    real = directory.resolve()
    if real.parent.name != "snapshots":
        return [real]
    blobs = real.parent.parent / "blobs"
    # Resolved in the user's own cache only: a stranger's "blobs" may be a link to anywhere.
    own = real.is_relative_to(Path(HF_HUB_CACHE).resolve())
    return [real, blobs.resolve() if own else blobs]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: it is missing, too large, no JSON or no object, or a link out of its directory.
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
    except (ValueError, RecursionError) as error:  # numbers may be too long, lists too deep
        raise UserError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object; copy it again")
    return value
