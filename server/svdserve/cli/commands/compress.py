"""`svdserve compress`."""

from collections.abc import Sequence
from typing import Annotated

import typer

from svdserve.cli import flags, options
from svdserve.cli.interrupt import resumable
from svdserve.cli.output import held_out_divergence, tell_if_complete
from svdserve.cli.settings import with_settings


class Command(flags.Command):
    @staticmethod
    def sources() -> Sequence[flags.Source]:
        from svdserve.compression.pipeline.recipe import Recipe, Run

        return (
            flags.Source(Recipe, panel="Recipe: what is computed"),
            flags.Source(Run, panel="Run: how this machine computes it"),
        )


def compress(
    ctx: typer.Context,
    model: options.DenseModel,
    out: options.Out,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="The recipe to start from: `default`, `best`, or a YAML file. Options that are "
            "given on the command line override it."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PART.NAME=VALUE",
            help="Set one field of a part of the recipe: a hyper-parameter of the `method` or of "
            "the `allocator`, or a field of `block_refinement` or `refinement`. VALUE is YAML, as "
            "in `--set 'method.beta_range=[0.25,0.5]'`. It may be repeated.",
        ),
    ] = None,
    beta: Annotated[
        str | None,
        typer.Option(metavar="X", help="A short form of `--set method.beta=X`."),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Compress a model: factor its linears and write a checkpoint.

    The recipe `best` trains the factors after the closed form. The result is better, and it takes
    several times longer. The checkpoint is a Hugging Face directory that transformers, vLLM and
    `svdserve serve` load. An interrupted run leaves DIR.partial, and the same command with
    `--resume` goes on with it.
    """
    options.grant(trust_remote_code=trust_remote_code, allow_links=allow_links)
    given = flags.given(ctx)
    with resumable(out):
        from svdserve.compression.pipeline.recipe import (
            Recipe,
            Run,
            load_recipe,
            make_recipe,
            make_run,
        )

        fields = {} if recipe is None else load_recipe(recipe)
        short = [] if beta is None else [f"method.beta={beta}"]
        fields = with_settings(fields | given.of(Recipe), [*short, *(settings or ())])
        checked, run = make_recipe(**fields), make_run(**given.of(Run))
        from svdserve.compression.pipeline.job import compress as run_job

        report = run_job(model, out, checked, run)
        tell_if_complete(report)
        typer.echo(
            f"{report.directory}: {report.stored_parameters:,} of {report.dense_parameters:,} "
            f"parameters of the blocks' linears kept, {report.seconds:.0f} s, "
            f"peak memory {report.peak_bytes / 2**20:,.0f} MiB"
        )
        if report.refinement is not None:
            typer.echo(held_out_divergence(report.refinement))
