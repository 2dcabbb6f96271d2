"""`svdserve eval`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from svdserve.cli import flags, options
from svdserve.compression.system.errors import UserError

if TYPE_CHECKING:
    from svdserve.compression.evaluation.perplexity import Perplexity
    from svdserve.compression.evaluation.tasks import TaskAccuracies


class Command(flags.Command):
    @staticmethod
    def sources() -> Sequence[flags.Source]:
        from svdserve.compression.evaluation.options import SingleEvaluation

        return (flags.Source(SingleEvaluation),)


def evaluate(
    ctx: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(help="Models, dense or compressed: directories or Hub names."),
    ],
    json_file: options.JsonFile = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Measure perplexity on texts, accuracy on multiple-choice tasks, or both.

    Perplexity follows the protocol of the SVD literature: a text is cut into chunks of equal length
    without special tokens, and the loss of a token is averaged over all chunks. Logits that are not
    finite are an error.
    """
    options.grant(trust_remote_code=trust_remote_code, allow_links=allow_links)
    from svdserve.compression.evaluation.evaluate import evaluate as measure
    from svdserve.compression.evaluation.options import SingleEvaluation
    from svdserve.compression.system.files import check_result_files, write_results

    asked = flags.given(ctx).make(SingleEvaluation)
    if not asked.texts and not asked.tasks:
        raise UserError("nothing to evaluate; give --text FILE, --task NAME, or both")
    check_result_files([json_file], asked.texts)
    found = measure(models, **dict(asked))
    if json_file is not None:
        write_results(json_file, found.portable())
    for start in range(0, len(found.perplexities), len(models)):
        _print_perplexity(found.perplexities[start : start + len(models)])
    if found.scores:
        _print_accuracies(found.scores)


def _print_perplexity(results: Sequence["Perplexity"]) -> None:
    table = Table("model", "dtype", title=f"Perplexity on {results[0].text}")
    for heading in ("perplexity", "mean loss", "chunks", "seq_len", "seconds"):
        table.add_column(heading, justify="right")
    for r in results:
        numbers = f"{r.perplexity:.3f}", f"{r.mean_loss:.4f}", str(r.chunks), str(r.seq_len)
        table.add_row(r.model, r.dtype, *numbers, f"{r.seconds:.0f}")
    Console().print(table)


def _print_accuracies(results: Sequence["TaskAccuracies"]) -> None:
    table = Table("model", "dtype", title="Accuracy (acc / acc_norm)")
    for score in results[0].scores:
        table.add_column(f"{score.task} ({score.items})", justify="right")
    for r in results:
        pairs = [(score.acc, score.acc_norm) for score in r.scores]
        cells = (" / ".join("-" if x is None else f"{x:.3f}" for x in pair) for pair in pairs)
        table.add_row(r.model, r.dtype, *cells)
    Console().print(table)
