"""Where a model is: a directory of this machine, or a snapshot of a model of the Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

from svdserve.compression.companions import DOWNLOADED, NOT_DOWNLOADED
from svdserve.compression.errors import UserError


def resolve_model(model: str) -> Path:
    """A local model directory: the given one, or a Hub model's snapshot (safetensors only).

    Raises:
        UserError: neither a directory nor a model that the Hub (or its cache) has.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise UserError(f"{model}: no such directory; give a model directory or a Hub name")
    try:
        return Path(
            snapshot_download(
                model,
                allow_patterns=list(DOWNLOADED),
                ignore_patterns=list(NOT_DOWNLOADED),
            )
        )
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{model}: no such directory, and the Hub says: {first}") from None
