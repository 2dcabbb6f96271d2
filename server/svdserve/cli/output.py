"""Lines that `svdserve compress` and `svdserve refine` both print."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from svdserve.compression.pipeline.report import RefineReport, Report


def tell_if_complete(report: "Report | RefineReport") -> None:
    """Say so if the job to resume was complete; the figures of that job are printed next."""
    if not report.made:
        typer.echo(f"{report.directory}: was already complete; nothing was changed", err=True)


def held_out_divergence(report: "RefineReport") -> str:
    """One line about the training: the held-out KL divergence before and after it."""
    return (
        f"held-out KL {report.before:.4f} to {report.after:.4f} nats per token in {report.steps} "
        f"steps, {report.seconds:.0f} s"
    )
