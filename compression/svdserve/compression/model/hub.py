"""Finding a model: a local directory, or a snapshot of a model of the Hub."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from svdserve.compression.model.companions import DOWNLOADED, NOT_DOWNLOADED
from svdserve.compression.system.errors import UserError


def resolve_model(model: str | Path) -> Path:
    """The directory of a model: the given one, or the downloaded snapshot of a Hub model.

    Raises:
        UserError: ``model`` is neither a directory nor a model of the Hub or its cache.
    """
    name = str(model)
    if os.path.isdir(name):
        return Path(model)
    if "\0" not in name and os.path.lexists(name):
        raise UserError(f"{name}: is no directory; give a model directory or a Hub name")
    if not _may_be_hub_name(name):
        raise UserError(f"{name}: no such directory; give a model directory or a Hub name")
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=list(DOWNLOADED),
                ignore_patterns=list(NOT_DOWNLOADED),
            )
        )
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: no such directory, and the Hub says: {first}; give a model directory, or the "
            "name of a Hub model that can be reached or is in the cache"
        ) from None


def _may_be_hub_name(name: str) -> bool:
    words = name.split("/")
    return len(words) <= 2 and all(words) and not name.startswith((".", "~")) and "\0" not in name


def hub_name(directory: Path) -> str | None:
    """The Hub name of a model whose directory is a snapshot in the Hub's cache, else None."""
    snapshots = directory.resolve().parent
    if snapshots.name != "snapshots" or not snapshots.parent.name.startswith("models--"):
        return None
    return as_hub_name(snapshots.parent.name.removeprefix("models--").replace("--", "/"))


def as_hub_name(value: Any) -> str | None:
    """``value`` if it could be the name of a repository of the Hub, else None."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return None
    return str(value)


def model_name(directory: str | Path) -> str:
    """Name of the model in a directory: the Hub name of a snapshot, or the folder's name."""
    return hub_name(Path(directory)) or Path(directory).resolve().name
