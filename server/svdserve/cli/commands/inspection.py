"""`svdserve inspect`."""

import json
from typing import Annotated

import typer

from svdserve.cli import options


def inspect(
    model: options.CompressedModel,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and compare it with SHA256SUMS.")
    ] = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Show what a compressed model stores: rank, bytes, error and β of every module."""
    options.grant(allow_links=allow_links)
    from svdserve.compression.evaluation.inspection import inspect_checkpoint, print_inspection
    from svdserve.compression.model.hub import resolve_model

    directory = resolve_model(model)
    if verify:
        from svdserve.compression.format.integrity import verify as compare_digests

        count = compare_digests(directory)
        typer.echo(f"{directory}: {count} files have the digests of SHA256SUMS", err=True)
    inspection = inspect_checkpoint(directory)
    if as_json:
        typer.echo(json.dumps(inspection.model_dump(mode="json"), indent=2))
    else:
        print_inspection(inspection)
