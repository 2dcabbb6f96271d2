"""`svdserve bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from svdserve.cli import flags, options
from svdserve.compression.evaluation.plots import check_figure
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import check_result_files, write_results

_EAGER = {"eager": "--eager/--compiled"}


class Command(flags.Command):
    @staticmethod
    def sources() -> Sequence[flags.Source]:
        from svdserve.bench.engine import BenchOptions
        from svdserve.bench.kernels import KernelOptions
        from svdserve.bench.served import LoadOptions

        return (
            flags.Source(
                BenchOptions,
                without=frozenset({"dense", "models"}),
                spellings=_EAGER,
                panel="Options without --served and --kernels",
            ),
            flags.Source(
                LoadOptions, spellings=_EAGER, when="--served", panel="Options with --served"
            ),
            flags.Source(
                KernelOptions,
                spellings={"rows": "--rows"},
                when="--kernels",
                panel="Options with --kernels",
            ),
        )


def bench(
    ctx: typer.Context,
    dense: Annotated[
        str | None, typer.Argument(help="The dense model: a directory or a Hub name.")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Argument(help="The compressed models to compare with it.")
    ] = None,
    served: Annotated[
        bool,
        typer.Option(
            "--served",
            help="Start a server for each model and measure what its clients see: the time to the "
            "first token (TTFT), the time per output token (TPOT) and the time between tokens "
            "(ITL).",
        ),
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Measure single layers, dense and low rank, with the shapes of DENSE, or of a "
            "Llama of 1B parameters if no model is given.",
        ),
    ] = False,
    json_file: options.JsonFile = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="Draw the speed relative to the dense model's into this .svg or .png file.",
        ),
    ] = None,
    allow_links: options.AllowLinks = False,
) -> None:
    """Compare the speed and memory of models in vLLM, in interleaved rounds.

    The dense model runs twice: as vLLM has it, and on a CPU also with svdserve's kernels, as
    `svdserve serve` serves it. Without `--served` and `--kernels`, decoding and prefill are
    measured separately in vLLM's engine. Each speed is shown beside the bytes ratio of decoding, or
    the operations ratio of prefill. With `--served`, the clients of `vllm bench serve` measure
    `svdserve serve`. With `--kernels`, no model is loaded.
    """
    options.grant(allow_links=allow_links)
    given = flags.given(ctx)
    if kernels:
        _refuse_beside_kernels(served, models, plot_file)
    elif dense is None or not models:
        raise UserError("bench compares models: name the dense one and then a compressed one")
    check_result_files([json_file, plot_file])
    check_figure(plot_file)
    names = [name for name in (dense, *(models or ())) if name is not None]
    if kernels:
        _bench_kernels(given, names[:1], json_file)
    elif served:
        _bench_served(given, names, json_file, plot_file)
    else:
        _bench_engines(given, names, json_file, plot_file)


def _refuse_beside_kernels(served: bool, models: list[str] | None, plot: Path | None) -> None:
    """Raise UserError if the user gave what `--kernels` would ignore."""
    if served:
        raise flags.not_with("--served", "--kernels")
    if plot is not None:
        raise flags.not_with("--plot", "--kernels")
    if models:
        raise UserError("--kernels measures the layers of one model; name at most DENSE")


def _bench_engines(
    given: flags.Given, names: list[str], json_file: Path | None, plot_file: Path | None
) -> None:
    from svdserve.bench.engine import BenchOptions, plot_bench, print_bench, run_bench
    from svdserve.compression.model.hub import resolve_model

    given.require_only(BenchOptions)
    dense, *models = map(Path, names)
    chosen = given.make(BenchOptions, dense=dense, models=models)  # checked before a download
    dense, *models = map(resolve_model, names)
    result = run_bench(chosen.model_copy(update={"dense": dense, "models": tuple(models)}))
    if json_file is not None:
        write_results(json_file, result.model_dump(mode="json"))
    if plot_file is not None:
        plot_bench(result, plot_file)
    print_bench(result)


def _bench_served(
    given: flags.Given, names: list[str], json_file: Path | None, plot_file: Path | None
) -> None:
    from svdserve.bench.report import markdown, plot
    from svdserve.bench.served import LoadOptions, run_load, targets_of
    from svdserve.compression.model.hub import resolve_model

    given.require_only(LoadOptions)
    chosen = given.make(LoadOptions)
    dense, *models = map(resolve_model, names)
    result = run_load(targets_of(dense, models, chosen.dtype), chosen)
    if json_file is not None:
        write_results(json_file, result.model_dump(mode="json"))
    if plot_file is not None:
        plot(result, plot_file)
    Console().print(markdown(result), markup=False, highlight=False, soft_wrap=True)


def _bench_kernels(given: flags.Given, names: list[str], json_file: Path | None) -> None:
    from svdserve.bench.kernels import (
        KernelOptions,
        layers_of,
        print_kernel_bench,
        run_kernel_bench,
    )
    from svdserve.compression.model.hub import resolve_model

    given.require_only(KernelOptions)
    chosen = given.make(KernelOptions)
    for name in names:
        chosen = chosen.model_copy(update={"layers": layers_of(resolve_model(name))})
    result = run_kernel_bench(chosen)
    if json_file is not None:
        write_results(json_file, result.model_dump(mode="json"))
    print_kernel_bench(result)
