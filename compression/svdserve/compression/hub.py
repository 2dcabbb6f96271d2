"""Where a model is: a directory of this machine, or a snapshot of a model of the Hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from svdserve.compression.errors import UserError

_FILES = [
    "*.json",
    "*.safetensors",
    "tokenizer*",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.py",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
]


def resolve_model(model: str | Path) -> Path:
    """A local model directory: the given one, or a Hub model's snapshot (safetensors only).

    Raises:
        UserError: neither a directory nor a model that the Hub (or its cache) has.
    """
    name = str(model)
    if os.path.isdir(name):
        return Path(model)
    if "\0" not in name and os.path.lexists(name):
        raise UserError(f"{name}: is no directory; give the model directory, or a Hub name")
    if not _may_be_hub_name(name):
        raise UserError(f"{name}: no such directory; give a model directory or a Hub name")
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=[*_FILES, "additional_chat_templates/*.jinja"],
                ignore_patterns=["*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt"],
            )
        )
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: no such directory, and the Hub says: {first}; give a model directory, or a "
            "Hub name that can be reached or is in the cache"
        ) from None


def _may_be_hub_name(name: str) -> bool:
    words = name.split("/")
    return len(words) <= 2 and all(words) and not name.startswith((".", "~")) and "\0" not in name


def model_name(directory: str | Path) -> str:
    """What to call the model of a directory: the Hub's name of a snapshot, or the folder's name."""
    real = Path(directory).resolve()
    repository = real.parent.parent.name
    if real.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return real.name
