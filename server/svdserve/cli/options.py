"""Options that several commands take, with one wording."""

from pathlib import Path
from typing import Annotated

import typer

Calibration = Annotated[
    str | None,
    typer.Option(help="Text FILE, hf:DATASET, self (the model's own samples), or joined by +."),
]
Tokens = Annotated[int | None, typer.Option(help="Calibration tokens.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per calibration sequence.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all when absent.")]
Out = Annotated[Path, typer.Option(help="Checkpoint directory to write.")]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--checkpointing/--no-checkpointing", help="Refine in less memory, or without recomputing."
    ),
]
Resume = Annotated[bool | None, typer.Option("--resume", help="Go on with an interrupted run.")]
Force = Annotated[
    bool | None, typer.Option("--force", help="Replace what DIR holds.", show_default=False)
]
ResumeAnyway = Annotated[
    bool | None,
    typer.Option(
        "--resume-anyway",
        help="Go on although threads, batch size, device or torch's version changed.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that the model brings along."),
]
AllowLinks = Annotated[
    bool,
    typer.Option("--allow-links", help="Follow links that lead out of the model's directory."),
]


def grant(*, trust_remote_code: bool = False, allow_links: bool = False) -> None:
    """Give this process and those below it what the user has allowed."""
    from svdserve.compression.system import permissions

    if trust_remote_code:
        permissions.allow(permissions.REMOTE_CODE)
    if allow_links:
        permissions.allow(permissions.LINKS)
