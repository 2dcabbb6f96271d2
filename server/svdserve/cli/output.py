"""Lines that `svdserve compress` and `svdserve refine` both print."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from svdserve.compression.pipeline.report import RefineReport, Report


def tell_if_complete(report: "Report | RefineReport") -> None:
    """Before the figures of a job that had ended before it was asked to resume."""
    if not report.made:
        typer.echo(f"{report.directory}: was complete; nothing is changed", err=True)


def held_out_divergence(report: "RefineReport") -> str:
    return (
        f"held-out KL {report.before:.4f} to {report.after:.4f} nats per token in {report.steps} "
        f"steps, {report.seconds:.0f} s"
    )
