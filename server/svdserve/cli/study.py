"""The commands for whoever studies a method: refine, eval, compare. main.py registers them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from svdserve.cli import options
from svdserve.cli.interrupt import resumable
from svdserve.compression.system.errors import UserError

if TYPE_CHECKING:
    from svdserve.compression.evaluation.perplexity import Perplexity
    from svdserve.compression.evaluation.tasks import TaskScores
    from svdserve.compression.pipeline.report import RefineReport, Report

Result = TypeVar("Result", bound=BaseModel)


def refine(
    teacher: Annotated[str, typer.Argument(help="The dense model: directory or Hub name.")],
    student: Annotated[
        str, typer.Argument(help="A compressed checkpoint of it: directory or Hub name.")
    ],
    out: options.Out,
    calibration: options.Calibration = None,
    tokens: options.Tokens = None,
    seq_len: options.SeqLen = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the tokens.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of AdamW's.")] = None,
    held_out: Annotated[float | None, typer.Option(help="Share of the sequences.")] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Times that held-out loss is measured.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Evaluations without gain before it stops.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Products in float32 or bfloat16.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the held-out part and the order of sequences.")
    ] = None,
    checkpointing: options.Checkpointing = None,
    device: options.Device = None,
    threads: options.Threads = None,
    resume: options.Resume = None,
    resume_anyway: options.ResumeAnyway = None,
    force: options.Force = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Train the factors of a checkpoint towards the dense model's predictions.

    On samples of the model itself, as many as the checkpoint's recipe says, unless others are
    given; a recipe's text has to be named again. Part of them is held out; what is written is never
    worse there than what was given.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    options.grant(trust_remote_code=trust_remote_code, allow_links=allow_links)
    with resumable(out):
        from svdserve.compression.model.hub import resolve_model
        from svdserve.compression.pipeline.recipe import Refinement, Run, make_run
        from svdserve.compression.pipeline.refine import check_own_calibration
        from svdserve.compression.pipeline.refine import refine as run_refinement

        settings = Refinement(**{k: given[k] for k in Refinement.model_fields if k in given})
        names = set(Run.model_fields) - {"batch_size"}
        run = make_run(**{name: given[name] for name in names if name in given})
        directory = resolve_model(student)
        check_own_calibration(directory, settings)
        report = run_refinement(teacher, directory, out, settings, run)
    tell_if_complete(report)
    typer.echo(f"{report.directory}: {held_out_divergence(report)}")


def tell_if_complete(report: "Report | RefineReport") -> None:
    """Before the figures of a job that had ended before it was asked to resume."""
    if not report.made:
        typer.echo(f"{report.directory}: was complete; nothing is changed", err=True)


def held_out_divergence(report: "RefineReport") -> str:
    return (
        f"held-out KL {report.before:.4f} to {report.after:.4f} nats per token in {report.steps} "
        f"steps, {report.seconds:.0f} s"
    )


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Models, dense or compressed: directories or Hub names.")
    ],
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
    device: options.Device = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this JSON file too.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Measure perplexity on a text, accuracy on multiple-choice tasks, or both.

    Perplexity by the protocol of the SVD literature: chunks of equal length without special
    tokens; the mean token loss over all chunks. Logits that are not finite are an error.
    """
    options.grant(trust_remote_code=trust_remote_code, allow_links=allow_links)
    from svdserve.compression.evaluation.perplexity import perplexity
    from svdserve.compression.evaluation.tasks import check_tasks, task_scores
    from svdserve.compression.model.hub import resolve_model
    from svdserve.compression.system.files import check_result_files
    from svdserve.compression.system.machine import usable_device

    if text is None and not tasks:
        raise UserError("nothing to evaluate; give --text FILE, --task NAME, or both")
    check_tasks(tasks or (), limit)
    check_result_files([json_file], [] if text is None else [text])
    usable_device(device or "cpu")
    directories = [resolve_model(model) for model in models]
    common = {"batch_size": batch_size, "dtype": dtype, "device": device}
    given: dict[str, Any] = {name: value for name, value in common.items() if value is not None}
    chunks: dict[str, Any] = {"seq_len": seq_len} if seq_len is not None else {}
    results = []
    if text is not None:
        options_of_text: dict[str, Any] = {"max_chunks": max_chunks, **chunks, **given}
        found = (perplexity(one, text, **options_of_text) for one in directories)
        results = [_called(name, result) for name, result in zip(models, found, strict=True)]
    scores = []
    if tasks:
        measured = (task_scores(one, tasks, limit=limit, **given) for one in directories)
        scores = [_called(name, result) for name, result in zip(models, measured, strict=True)]
    if json_file is not None:
        write_json(json_file, [result.model_dump(mode="json") for result in (*results, *scores)])
    if results:
        _print_perplexity(results)
    if scores:
        _print_scores(scores)


def _called(name: str, result: Result) -> Result:
    """A result under the name that the user gave, which may be one of the Hub."""
    return result.model_copy(update={"model": name})


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


def compare(
    model: Annotated[str, typer.Argument(help="The dense model: directory or Hub name.")],
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and finished evaluations.")],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="As in its paper, a pair of factors of one κ for every linear; may be repeated.",
        ),
    ] = None,
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="As in `svdserve compress`; may be repeated."),
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
    seq_len: options.SeqLen = None,
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
    trust_remote_code: options.TrustRemoteCode = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Compare methods: compress and evaluate a grid of recipes and keep ratios.

    Run the same command again to go on after an interruption.
    """
    options.grant(trust_remote_code=trust_remote_code, allow_links=allow_links)
    from svdserve.compression.evaluation.compare import Evaluation, markdown, plot, print_comparison
    from svdserve.compression.evaluation.compare import compare as run_comparison
    from svdserve.compression.evaluation.plots import check_figure
    from svdserve.compression.methods import get_method
    from svdserve.compression.pipeline.recipe import load_recipe, make_recipe, make_run
    from svdserve.compression.system.files import check_result_files, write_text

    check_result_files([json_file, table_file, plot_file], texts or ())
    check_figure(plot_file)
    same = {"calibration": calibration, "tokens": tokens, "seq_len": seq_len}
    given: dict[str, Any] = {name: value for name, value in same.items() if value is not None}
    files = recipes or ([] if methods else ["default"])
    chosen = {Path(file).stem: make_recipe(**(load_recipe(file) | given)) for file in files}
    for name in methods or ():
        paper = {"layout": "pair", "grouping": "separate"} | given
        if get_method(name).learner is None:  # which shares the parameters itself
            paper["allocator"] = "uniform"
        chosen[name] = make_recipe(method=name, **paper)
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
        write_json(json_file, found.portable())
    if table_file is not None:
        write_text(table_file, markdown(found))
    if plot_file is not None:
        plot(found, plot_file)
    print_comparison(found)


def bench_served(
    models: list[Path], given: dict[str, Any], json_file: Path | None, plot_file: Path | None
) -> None:
    """`svdserve bench --served`, with the options of LoadOptions that ``given`` holds."""
    from svdserve.bench.report import markdown, plot
    from svdserve.bench.served import LoadOptions, Target, run_load
    from svdserve.compression.model.hub import model_name

    chosen = {name: given[name] for name in LoadOptions.model_fields if name in given}
    targets = [Target(model_name(model).rpartition("/")[2], model) for model in models]
    result = run_load(targets, LoadOptions(**chosen))
    if json_file is not None:
        write_json(json_file, result.model_dump(mode="json"))
    if plot_file is not None:
        plot(result, plot_file)
    Console().print(markdown(result), markup=False, highlight=False, soft_wrap=True)


def write_json(file: Path, value: Any) -> None:
    """Write the results of a command, in one step."""
    from svdserve.compression.system.files import make_folder
    from svdserve.compression.system.files import write_json as write_whole

    make_folder(file.parent)
    write_whole(file, value)
