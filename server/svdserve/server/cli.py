"""The command line: svdserve compress | eval | compare | serve | bench | inspect | methods.

Options that are not given are left to the models that define their defaults (Recipe, Run,
BenchOptions, the signature of ``perplexity``); their help pages read the defaults there. Modules
that import torch or vLLM are imported inside the commands, so that help is immediate.
"""

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperOption

from svdserve.compression.errors import UserError

if TYPE_CHECKING:
    from svdserve.compression.evaluate import Perplexity
    from svdserve.compression.tasks import TaskScores


def _recipe_defaults() -> dict[str, Any]:
    from svdserve.compression.recipe import Recipe, Run

    return {**_field_defaults(Recipe), **_field_defaults(Run), **Recipe().parameters}


def _bench_defaults() -> dict[str, Any]:
    from svdserve.server.bench import BenchOptions

    return _field_defaults(BenchOptions)


def _eval_defaults() -> dict[str, Any]:
    from svdserve.compression.evaluate import perplexity

    return {name: p.default for name, p in inspect.signature(perplexity).parameters.items()}


def _field_defaults(model: type[BaseModel]) -> dict[str, Any]:
    fields = model.model_fields.items()
    return {name: field.get_default(call_default_factory=True) for name, field in fields}


_DEFAULTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "compress": _recipe_defaults,
    "eval": _eval_defaults,
    "bench": _bench_defaults,
}


class _Command(TyperCommand):
    """A command whose help page shows the defaults of the model behind it."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        known = _DEFAULTS[self.name or ""]()
        for parameter in self.params:
            value = known.get(parameter.name or "")
            if isinstance(parameter, TyperOption) and parameter.default is None and value:
                several = isinstance(value, tuple)
                parameter.show_default = " ".join(map(str, value)) if several else str(value)
        super().format_help(ctx, formatter)


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


@app.command(cls=_Command)
def compress(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or Hub name.")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    recipe: Annotated[
        Path | None, typer.Option(help="YAML recipe; options given here override it.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Keep ratio κ: stored over dense parameters.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `svdserve methods`.")] = None,
    layout: Annotated[str | None, typer.Option(help="interpolative or pair.")] = None,
    grouping: Annotated[str | None, typer.Option(help="shared or separate.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text FILE, hf:DATASET, or self (the model's own samples).")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per calibration sequence.")] = None,
    beta: Annotated[
        str | None, typer.Option(help="SAES-SVD's β: aces, exact, or a number from 0 to 1.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Stored dtype: auto, float32, bfloat16 or float16.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the calibration tokens.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all when absent.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per forward step.")] = None,
    offload: Annotated[
        Path | None, typer.Option(help="Folder for the hidden streams; memory when absent.")
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = None,
    force: Annotated[
        bool | None, typer.Option("--force", help="Replace what DIR holds.", show_default=False)
    ] = None,
) -> None:
    """Compress a model: factor its linears and write a checkpoint.

    The checkpoint is a Hugging Face directory that transformers, vLLM and `svdserve serve` load.
    An interrupted run leaves DIR.partial and goes on with `--resume`.
    """
    from svdserve.compression.recipe import Recipe, Run, load_recipe, make_recipe, make_run

    fields = load_recipe(recipe) if recipe else {}
    given = {name: value for name, value in locals().items() if value is not None}
    fields |= {name: given[name] for name in Recipe.model_fields if name in given}
    if beta is not None:
        fields["parameters"] = {**fields.get("parameters", {}), "beta": _number_or_name(beta)}
    checked = make_recipe(**fields)
    run = make_run(**{name: given[name] for name in Run.model_fields if name in given})
    from svdserve.compression.job import compress as run_job

    report = run_job(model, out, checked, run)
    typer.echo(
        f"{report.directory}: {report.stored_parameters:,} of {report.dense_parameters:,} "
        f"parameters of the factored linears kept, {report.seconds:.0f} s, "
        f"peak memory {report.peak_bytes / 2**20:,.0f} MiB"
    )


@app.command(name="eval", cls=_Command)
def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Model directories, dense or compressed.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file for perplexity, taken verbatim.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", help="JSONL file or name of lm-evaluation-harness; may repeat."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task; all when absent.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a chunk.")] = None,
    max_chunks: Annotated[
        int | None, typer.Option(help="Use the first chunks only; all when absent.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Chunks or requests of one forward step.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (the model's own), float32, bfloat16 or float16.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this JSON file too.")
    ] = None,
) -> None:
    """Measure perplexity on a text, accuracy on multiple-choice tasks, or both.

    Perplexity by the protocol of the SVD literature: chunks of equal length without special
    tokens; the mean token loss over all chunks. Logits that are not finite are an error.
    """
    from svdserve.compression.evaluate import perplexity
    from svdserve.compression.tasks import task_scores

    if text is None and not tasks:
        raise UserError("nothing to evaluate; give --text FILE, --task NAME, or both")
    common = {"batch_size": batch_size, "dtype": dtype, "device": device}
    given: dict[str, Any] = {name: value for name, value in common.items() if value is not None}
    chunks: dict[str, Any] = {"seq_len": seq_len} if seq_len is not None else {}
    results = (
        []
        if text is None
        else [perplexity(model, text, max_chunks=max_chunks, **chunks, **given) for model in models]
    )
    scores = [task_scores(model, tasks, limit=limit, **given) for model in models] if tasks else []
    if json_file is not None:
        _write_json(json_file, [result.model_dump(mode="json") for result in (*results, *scores)])
    if results:
        _print_perplexity(results)
    if scores:
        _print_scores(scores)


def _print_perplexity(results: list["Perplexity"]) -> None:
    table = Table("model", "dtype", title=f"Perplexity on {results[0].text}")
    for heading in ("perplexity", "mean loss", "chunks", "seq_len", "seconds"):
        table.add_column(heading, justify="right")
    for r in results:
        numbers = f"{r.perplexity:.3f}", f"{r.mean_loss:.4f}", str(r.chunks), str(r.seq_len)
        table.add_row(r.model, r.dtype, *numbers, f"{r.seconds:.0f}")
    Console().print(table)


def _print_scores(results: list["TaskScores"]) -> None:
    table = Table("model", "dtype", title="Accuracy (acc / acc_norm)")
    for score in results[0].scores:
        table.add_column(f"{score.task} ({score.items})", justify="right")
    for r in results:
        pairs = [(score.acc, score.acc_norm) for score in r.scores]
        cells = (" / ".join("-" if x is None else f"{x:.3f}" for x in pair) for pair in pairs)
        table.add_row(r.model, r.dtype, *cells)
    Console().print(table)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="The dense model: directory or Hub name.")],
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and finished evaluations.")],
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="By its defaults; may be repeated.")
    ] = None,
    recipes: Annotated[
        list[Path] | None, typer.Option("--recipe", help="YAML recipe; may be repeated.")
    ] = None,
    keeps: Annotated[
        list[float] | None, typer.Option("--keep", help="Keep ratio κ; may be repeated.")
    ] = None,
    texts: Annotated[
        list[Path] | None, typer.Option("--text", help="Text for perplexity; may be repeated.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="As in `svdserve eval`; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task; all when absent.")] = None,
    max_chunks: Annotated[int | None, typer.Option(help="Chunks of a text; all if absent.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Of every recipe: text FILE, hf:DATASET, or self.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens of every recipe.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every result to this JSON file.")
    ] = None,
    table_file: Annotated[
        Path | None, typer.Option("--table", help="Write the Markdown table to this file.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw perplexity over bytes into this .svg/.png.")
    ] = None,
) -> None:
    """Compare methods: compress and evaluate a grid of recipes and keep ratios.

    Run the same command again to go on after an interruption.
    """
    from svdserve.compression.compare import Evaluation, markdown, plot, print_comparison
    from svdserve.compression.compare import compare as run_comparison
    from svdserve.compression.recipe import load_recipe, make_recipe, make_run

    same = {"calibration": calibration, "tokens": tokens}
    given = {name: value for name, value in same.items() if value is not None}
    chosen = {path.stem: make_recipe(**(load_recipe(path) | given)) for path in recipes or []}
    named = methods or ([] if recipes else [make_recipe().method])
    chosen |= {name: make_recipe(method=name, **given) for name in named}
    evaluation = Evaluation(
        texts=tuple(texts or ()),
        tasks=tuple(tasks or ()),
        limit=limit,
        max_chunks=max_chunks,
        device=device,
    )
    for keep in keeps or ():
        make_recipe(keep=keep)  # before the long part starts
    run = make_run(device=device)
    found = run_comparison(model, work, chosen, keeps or [make_recipe().keep], evaluation, run)
    if json_file is not None:
        _write_json(json_file, found.model_dump(mode="json"))
    if table_file is not None:
        table_file.write_text(markdown(found))
    if plot_file is not None:
        plot(found, plot_file)
    print_comparison(found)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def serve(
    ctx: typer.Context,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Model directory; first.")],
) -> None:
    """Serve a model with vLLM's OpenAI-compatible server.

    Every flag of `vllm serve` may follow DIR, such as `--port 8001 --max-model-len 4096`;
    `vllm serve --help=all` lists them. The server listens on 127.0.0.1:8000 unless told
    otherwise. A dense model is served as it is.
    """
    from svdserve.server.serve import serve as run_server

    raise typer.Exit(run_server(directory, ctx.args))


@app.command(cls=_Command)
def bench(
    dense: Annotated[Path, typer.Argument(help="The dense model.")],
    models: Annotated[list[Path], typer.Argument(help="Compressed models to compare with it.")],
    pairs: Annotated[int | None, typer.Option(help="Rounds that count; one more warms up.")] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", help="Decode batch; may be repeated.")
    ] = None,
    prompt_len: Annotated[int | None, typer.Option(help="Prompt tokens of decoding.")] = None,
    output_len: Annotated[int | None, typer.Option(help="Tokens decoded for a prompt.")] = None,
    prefill_len: Annotated[int | None, typer.Option(help="Prompt tokens of prefill.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    eager: Annotated[
        bool | None, typer.Option("--eager/--compiled", help="Without or with compilation.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all rounds to this JSON file too.")
    ] = None,
) -> None:
    """Compare the speed and memory of models in vLLM, in interleaved rounds."""
    given = {name: value for name, value in locals().items() if value is not None}
    from svdserve.server.bench import BenchOptions, print_bench, run_bench

    chosen = {name: given[name] for name in BenchOptions.model_fields if name in given}
    result = run_bench(BenchOptions(**chosen))
    if json_file is not None:
        _write_json(json_file, result.model_dump(mode="json"))
    print_bench(result)


@app.command(name="inspect")
def inspect_(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show what a compressed model stores: rank, bytes, error and β of every module."""
    from svdserve.compression.inspection import inspect_checkpoint, print_inspection

    inspection = inspect_checkpoint(directory)
    if as_json:
        typer.echo(json.dumps(inspection.model_dump(mode="json"), indent=2))
    else:
        print_inspection(inspection)


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
    """Entry point of ``svdserve``: bad input is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        _fail(f"{name}: {first['msg']} (given: {first['input']!r})")


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
