"""`svdserve methods`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def methods(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
) -> None:
    """List the compression methods, their papers and their parameters."""
    from svdserve.compression.methods import METHODS, markdown_table

    if markdown:
        typer.echo(markdown_table(), nl=False)
        return
    table = Table("method", "title", "paper", "statistics", "parameters")
    for name, entry in sorted(METHODS.items()):
        needs = ", ".join(sorted(entry.statistics)) or "none"
        takes = (
            ", ".join(f"{key}={value}" for key, value in entry.hyper_parameters.items()) or "none"
        )
        table.add_row(name, entry.title, entry.paper, needs, takes)
    Console().print(table)
