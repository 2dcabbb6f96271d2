"""`svdserve verify`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from svdserve.cli import options


def verify(
    model: options.CompressedModel,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="The number of tensor-parallel ranks to verify on.")
    ] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            help="The dtype that vLLM serves in. Allowed: `auto`, `float32`, `bfloat16`, `float16`."
        ),
    ] = "auto",
    allow_links: options.AllowLinks = False,
) -> None:
    """Compare every layer, as vLLM serves it here, with the dense weights that its factors give.

    The exit code is 1 if a layer is wrong.
    """
    options.grant(allow_links=allow_links)
    from svdserve.compression.format.reader import open_checkpoint
    from svdserve.compression.model.hub import resolve_model

    directory = resolve_model(model)
    open_checkpoint(directory)
    from svdserve.server.plugin.verify import verify as compare_layers

    checks = compare_layers(directory, tensor_parallel_size, dtype)
    table = Table("layer", "relative error", "allowed", title="The largest errors")
    for check in sorted(checks, key=lambda check: -check.error)[:5]:
        table.add_row(check.name, f"{check.error:.2e}", f"{check.allowed:g}")
    Console().print(table)
    wrong = sum(not check.right for check in checks)
    typer.echo(f"{directory}: {len(checks) - wrong} of {len(checks)} layers are right")
    raise typer.Exit(1 if wrong else 0)
