"""`svdserve serve`."""

import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from svdserve.cli import flags, options


class Command(flags.Command):
    """A command that passes all other words on to vLLM, with the ``--`` before a model."""

    @staticmethod
    def sources() -> Sequence[flags.Source]:
        from svdserve.server.http.security import SecurityOptions

        return (flags.Source(SecurityOptions, variables="SVDSERVE_"),)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "-h" in args:
            args = ["--help"]
        elif "--" in args:
            place = args.index("--")
            args = [*args[:place], "--", *args[place:]]  # the parser removes one of them
        return super().parse_args(ctx, args)


SETTINGS = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    # Not -h: the parser would find it in vLLM's -cc.cudagraph_mode=NONE.
    "help_option_names": ["--help"],
}


def serve(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="The model: a directory or a Hub name."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare every layer with its weights before serving, and refuse a wrong one.",
        ),
    ] = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Serve a model with vLLM's OpenAI-compatible server.

    Every flag of `vllm serve` works too, such as `--port 8001 --max-model-len 4096`;
    `vllm serve --help=all` lists them. The default address is 127.0.0.1:8000. A dense model is
    served dense, on a CPU with svdserve's kernels; `--load-format auto` serves it as vLLM does.
    The environment variable SVDSERVE_API_KEYS may also hold keys, separated by commas. After
    SIGTERM, requests have `--shutdown-timeout` seconds to finish, 30 by default.
    """
    from svdserve.server.http.security import SecurityOptions
    from svdserve.server.layer_checks import VERIFY
    from svdserve.server.serve import configured_model
    from svdserve.server.serve import serve as run_server
    from svdserve.server.vllm_flags import find_model

    options.grant(allow_links=allow_links)
    if verify:
        os.environ[VERIFY] = "1"
    fixed = SecurityOptions.from_environment().api_keys
    chosen = flags.given(ctx).make(SecurityOptions, api_keys=fixed)
    every = [*(words or []), *ctx.args]
    model, rest = find_model(every, configured_model(every))
    raise typer.Exit(run_server(model, rest, chosen))
