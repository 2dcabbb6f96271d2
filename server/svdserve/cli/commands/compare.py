"""`svdserve compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from svdserve.cli import flags, options

_CALIBRATION = frozenset({"calibration", "tokens", "seq_len"})
_PAPER = {"layout": "pair", "grouping": "separate"}


class Command(flags.Command):
    @staticmethod
    def sources() -> Sequence[flags.Source]:
        from svdserve.compression.evaluation.options import Evaluation
        from svdserve.compression.pipeline.recipe import Recipe, Run

        return (
            flags.Source(
                Evaluation, without=frozenset({"seq_len"}), panel="What models are measured on"
            ),
            flags.Source(Recipe, only=_CALIBRATION, panel="What replaces a recipe's calibration"),
            flags.Source(Run, only=frozenset({"device"}), panel="What models are measured on"),
        )


def compare(
    ctx: typer.Context,
    model: options.DenseModel,
    work: Annotated[
        Path, typer.Option(help="A folder for checkpoints and for finished evaluations.")
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="A method as in its paper: every linear gets a pair of factors with the same κ. "
            "It may be repeated.",
        ),
    ] = None,
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            help="A recipe: `default`, `best`, or a YAML file. It may be repeated. Without "
            "recipes and methods, `default` is compared.",
        ),
    ] = None,
    keeps: Annotated[
        list[float] | None,
        typer.Option(
            "--keep", help="A keep ratio κ for all recipes and methods. It may be repeated."
        ),
    ] = None,
    json_file: options.JsonFile = None,
    table_file: Annotated[
        Path | None, typer.Option("--table", help="Also write a Markdown table to this file.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw perplexity over bytes into this .svg or .png file."),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Compare methods: compress and evaluate a grid of recipes and keep ratios.

    After an interruption, run the same command again to go on.
    """
    options.grant(trust_remote_code=trust_remote_code, allow_links=allow_links)
    from svdserve.compression.evaluation.compare import compare as run_comparison
    from svdserve.compression.evaluation.compare import markdown, plot, print_comparison
    from svdserve.compression.evaluation.options import Evaluation
    from svdserve.compression.evaluation.plots import check_figure
    from svdserve.compression.methods import get_method
    from svdserve.compression.pipeline.recipe import (
        Recipe,
        Run,
        load_recipe,
        make_recipe,
        make_run,
    )
    from svdserve.compression.system.files import check_result_files, write_results, write_text

    given = flags.given(ctx)
    evaluation, run = given.make(Evaluation), make_run(**given.of(Run))
    check_result_files([json_file, table_file, plot_file], evaluation.texts)
    check_figure(plot_file)
    text = given.of(Recipe)
    files = recipes or ([] if methods else ["default"])
    chosen = {Path(file).stem: make_recipe(**(load_recipe(file) | text)) for file in files}
    for name in methods or ():
        # A method that learns ranks distributes the parameters among the linears itself.
        uniform = {"allocator": "uniform"} if get_method(name).learner is None else {}
        chosen[name] = make_recipe(method=name, **_PAPER, **uniform, **text)
    for keep in keeps or ():
        make_recipe(keep=keep)  # checked before the long part starts
    found = run_comparison(model, work, chosen, keeps or [make_recipe().keep], evaluation, run)
    if json_file is not None:
        write_results(json_file, found.portable())
    if table_file is not None:
        write_text(table_file, markdown(found))
    if plot_file is not None:
        plot(found, plot_file)
    print_comparison(found)
