"""Options that several commands share and that are not fields of a pydantic model."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="The checkpoint directory to write.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the results to this JSON file.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code in the model's directory."),
]
AllowLinks = Annotated[
    bool,
    typer.Option("--allow-links", help="Follow links that lead out of the model's directory."),
]
DenseModel = Annotated[
    str, typer.Argument(help="The dense model: a Hugging Face directory or a Hub name.")
]
CompressedModel = Annotated[
    str, typer.Argument(help="A compressed model: a directory or a Hub name.")
]


def grant(*, trust_remote_code: bool = False, allow_links: bool = False) -> None:
    """Allow this process and its children what the user has allowed."""
    from svdserve.compression.system import permissions

    if trust_remote_code:
        permissions.allow(permissions.REMOTE_CODE)
    if allow_links:
        permissions.allow(permissions.LINKS)
