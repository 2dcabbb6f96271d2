"""The command line of svdserve; the commands for studying methods are in study.py.

Options that are not given are left to the models that define their defaults (Recipe, Run,
BenchOptions, the signature of ``perplexity``); their help pages read the defaults there. Modules
that import torch or vLLM are imported inside the commands, so that help is immediate.
"""

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from svdserve.cli import options, study
from svdserve.cli.help_pages import Command, ServeCommand, show_versions
from svdserve.cli.interrupt import resumable
from svdserve.compression.evaluation.plots import check_figure
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import check_result_files
from svdserve.server.faults import EngineDied, to_mend

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


@app.command(cls=Command)
def compress(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or Hub name.")],
    out: options.Out,
    recipe: Annotated[
        str | None,
        typer.Option(help="default, best, or a YAML file; options given here override it."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Keep ratio κ: stored over dense parameters.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `svdserve methods`.")] = None,
    allocator: Annotated[
        str | None,
        typer.Option(help="How modules share κ: uniform, divergence, energy, sensitivity, ..."),
    ] = None,
    rank_multiple: Annotated[
        int | None, typer.Option(help="Make every rank a multiple of it.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="interpolative or pair.")] = None,
    grouping: Annotated[str | None, typer.Option(help="shared or separate.")] = None,
    calibration: options.Calibration = None,
    tokens: options.Tokens = None,
    seq_len: options.SeqLen = None,
    gradient_tokens: Annotated[
        int | None, typer.Option(help="Calibration tokens with gradients, where they are needed.")
    ] = None,
    beta: Annotated[
        str | None, typer.Option(help="SAES-SVD's β: aces, exact, or a number from 0 to 1.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Stored dtype: auto, float32, bfloat16 or float16.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of the blocks' linears: float (in dtype) or int8.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the calibration tokens.")] = None,
    device: options.Device = None,
    threads: options.Threads = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per forward step.")] = None,
    offload: Annotated[
        Path | None, typer.Option(help="Folder for the hidden streams; memory when absent.")
    ] = None,
    checkpointing: options.Checkpointing = None,
    resume: options.Resume = None,
    resume_anyway: options.ResumeAnyway = None,
    force: options.Force = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Compress a model: factor its linears and write a checkpoint.

    The recipe `best` trains the factors after the closed form: better, and several times slower.
    The checkpoint is a Hugging Face directory that transformers, vLLM and `svdserve serve` load.
    An interrupted run leaves DIR.partial and goes on with `--resume`.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    options.grant(trust_remote_code=trust_remote_code, allow_links=allow_links)
    with resumable(out):
        _compress(given)


def _compress(given: dict[str, Any]) -> None:
    from svdserve.compression.pipeline.recipe import Recipe, Run, load_recipe, make_recipe, make_run

    fields = load_recipe(given["recipe"]) if "recipe" in given else {}
    fields |= {name: given[name] for name in Recipe.model_fields if name in given}
    if "beta" in given:
        beta = _number_or_name(given["beta"])
        fields["parameters"] = {**fields.get("parameters", {}), "beta": beta}
    checked = make_recipe(**fields)
    run = make_run(**{name: given[name] for name in Run.model_fields if name in given})
    from svdserve.compression.pipeline.job import compress as run_job

    report = run_job(given["model"], given["out"], checked, run)
    study.tell_if_complete(report)
    typer.echo(
        f"{report.directory}: {report.stored_parameters:,} of {report.dense_parameters:,} "
        f"parameters of the blocks' linears kept, {report.seconds:.0f} s, "
        f"peak memory {report.peak_bytes / 2**20:,.0f} MiB"
    )
    if report.refinement is not None:
        typer.echo(study.held_out_divergence(report.refinement))


app.command(cls=Command)(study.refine)
app.command(name="eval", cls=Command)(study.evaluate)
app.command()(study.compare)


@app.command(
    cls=ServeCommand,
    # Not -h: it would be found within vLLM's -cc.cudagraph_mode=NONE.
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": ["--help"],
    },
)
def serve(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Directory or Hub name.")
    ] = None,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            envvar="SVDSERVE_API_KEYS_FILE",
            help="API keys, one a line; read again when it changes. Without any, nobody is asked.",
        ),
    ] = None,
    metrics_auth: Annotated[
        str | None,
        typer.Option(
            envvar="SVDSERVE_METRICS_AUTH",
            help="key (default) or none: whether /metrics and /dashboard need a key, too.",
        ),
    ] = None,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(envvar="SVDSERVE_MAX_BODY_BYTES", help="Longest request; 8 MiB by default."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare every layer with its weights before serving."),
    ] = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Serve a model with vLLM's OpenAI-compatible server.

    Every flag of `vllm serve` may stand beside MODEL, such as `--port 8001 --max-model-len 4096`;
    `vllm serve --help=all` lists them. The server listens on 127.0.0.1:8000 unless told
    otherwise. A dense model is served as it is. Keys may also come from SVDSERVE_API_KEYS, parted
    by commas. SIGTERM lets requests finish for `--shutdown-timeout` seconds, 30 by default.
    """
    from svdserve.server.http.security import SecurityOptions
    from svdserve.server.serve import configured_model
    from svdserve.server.serve import serve as run_server
    from svdserve.server.vllm_flags import find_model

    names = ("api_keys_file", "metrics_auth", "max_body_bytes")
    given = {name: value for name, value in locals().items() if name in names and value is not None}
    options.grant(allow_links=allow_links)
    if verify:
        os.environ["SVDSERVE_VERIFY"] = "1"
    base = SecurityOptions.from_environment()
    chosen = SecurityOptions(**{**base.model_dump(), **given})
    words = [*(words or []), *ctx.args]
    model, flags = find_model(words, configured_model(words))
    raise typer.Exit(run_server(model, flags, chosen))


@app.command(cls=Command)
def bench(
    dense: Annotated[
        str | None, typer.Argument(help="The dense model: directory or Hub name.")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Argument(help="Compressed models to compare with it.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="Rounds that count; one more warms up.")] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", help="Decode batch; may be repeated.")
    ] = None,
    prompt_len: Annotated[int | None, typer.Option(help="Prompt tokens of decoding.")] = None,
    output_len: Annotated[int | None, typer.Option(help="Tokens decoded for a prompt.")] = None,
    prefill_len: Annotated[int | None, typer.Option(help="Prompt tokens of prefill.")] = None,
    served: Annotated[
        bool, typer.Option("--served", help="Through each model's server: TTFT, TPOT, ITL.")
    ] = False,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Clients of a server; may be repeated.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Of each client in a round.")] = None,
    max_len: Annotated[int | None, typer.Option(help="Tokens of a served request.")] = None,
    starts: Annotated[int | None, typer.Option(help="Starts of each server or engine.")] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Single layers of DENSE, or of a 1B Llama shape.")
    ] = False,
    rows: Annotated[
        list[int] | None, typer.Option(help="Of --kernels: tokens; may be repeated.")
    ] = None,
    keeps: Annotated[
        list[float] | None, typer.Option("--keep", help="Of --kernels: κ; may be repeated.")
    ] = None,
    device: options.Device = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    eager: Annotated[
        bool | None, typer.Option("--eager/--compiled", help="Without or with compilation.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all rounds to this JSON file too.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw the ratios into this .svg/.png.")
    ] = None,
    allow_links: options.AllowLinks = False,
) -> None:
    """Compare the speed and memory of models in vLLM, in interleaved rounds.

    In the engine, decoding and prefill apart, each beside its ideal ratio; or, with --served, as
    clients of `svdserve serve` see it under the load of `vllm bench serve`. With --kernels no
    model is loaded: single layers, dense and low rank, on --device.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    options.grant(allow_links=allow_links)
    from svdserve.compression.model.hub import resolve_model

    if not kernels and (dense is None or not models):
        raise UserError("bench compares models: name the dense one and then a compressed one")
    check_result_files([json_file, plot_file])
    check_figure(plot_file)
    found = [resolve_model(model) for model in (dense, *(models or ())) if model is not None]
    if kernels:
        _bench_kernels(found[0] if found else None, given, json_file)
        return
    if served:
        study.bench_served(found, given, json_file, plot_file)
        return
    given |= {"dense": found[0], "models": found[1:]}
    from svdserve.bench.engine import BenchOptions, plot_bench, print_bench, run_bench

    chosen = {name: given[name] for name in BenchOptions.model_fields if name in given}
    result = run_bench(BenchOptions(**chosen))
    if json_file is not None:
        study.write_json(json_file, result.model_dump(mode="json"))
    if plot_file is not None:
        plot_bench(result, plot_file)
    print_bench(result)


def _bench_kernels(model: Path | None, given: dict[str, Any], json_file: Path | None) -> None:
    from svdserve.bench.kernels import (
        KernelOptions,
        layers_of,
        print_kernel_bench,
        run_kernel_bench,
    )

    chosen = {name: given[name] for name in KernelOptions.model_fields if name in given}
    if model is not None:
        chosen["layers"] = layers_of(model)
    result = run_kernel_bench(KernelOptions(**chosen))
    if json_file is not None:
        study.write_json(json_file, result.model_dump(mode="json"))
    print_kernel_bench(result)


@app.command(name="inspect")
def inspect_(
    model: Annotated[str, typer.Argument(help="A compressed model: directory or Hub name.")],
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


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A compressed model: directory or Hub name.")],
    tensor_parallel_size: Annotated[int, typer.Option(help="TP ranks to verify on.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    allow_links: options.AllowLinks = False,
) -> None:
    """Compare every layer, as vLLM serves it here, with the weights that it stands for.

    Exit code 1 if a layer is wrong.
    """
    options.grant(allow_links=allow_links)
    from svdserve.compression.format.checkpoint import open_checkpoint
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


@app.callback()
def svdserve(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_versions, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    """Make a large language model smaller with SVD, and serve it on vLLM."""
    del version


@app.command(name="install-hook")
def install_hook(
    remove: Annotated[bool, typer.Option("--remove", help="Take the hook out again.")] = False,
) -> None:
    """Let every Python of this environment load compressed models without an import.

    Writes a .pth file, which Python reads at every start. Without it `import svdserve.compression`
    does the same for one program; vLLM and svdserve need neither.
    """
    from svdserve.compression.model.hook import hook_path, install_hook

    try:
        if remove:
            hook_path().unlink(missing_ok=True)
            typer.echo(f"{hook_path()}: is removed")
        else:
            typer.echo(f"{install_hook()}: is written; --remove takes it out again")
    except OSError as error:
        raise UserError(
            f"{hook_path()}: cannot be changed ({error.strerror}); take an environment of your own"
        ) from None


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the README has it.")] = False,
) -> None:
    """List the compression methods, their papers and their parameters."""
    from svdserve.compression.methods import METHODS, markdown_table

    if markdown:
        typer.echo(markdown_table(), nl=False)
        return
    table = Table("method", "title", "paper", "statistics", "parameters")
    for name, entry in sorted(METHODS.items()):
        needs = ", ".join(sorted(entry.statistics)) or "none"
        takes = ", ".join(f"{key}={value}" for key, value in entry.parameters.items()) or "none"
        table.add_row(name, entry.title, entry.paper, needs, takes)
    Console().print(table)


def main() -> None:
    """Entry point of ``svdserve``.

    What the user or the machine has to mend is one line on stderr and exit code 2; an engine that
    died ends with the end of its log and 1. Only a fault of svdserve itself has a traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may be in no encoding
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
        if (message := to_mend(error)) is None:
            raise
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
