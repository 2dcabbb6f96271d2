"""`svdserve refine`."""

from collections.abc import Sequence

import typer

from svdserve.cli import flags, options
from svdserve.cli.interrupt import resumable
from svdserve.cli.output import held_out_divergence, tell_if_complete

_UNUSED = frozenset({"batch_size", "offload", "cache"})  # fields of a Run that have no effect here


class Command(flags.Command):
    @staticmethod
    def sources() -> Sequence[flags.Source]:
        from svdserve.compression.pipeline.recipe import Refinement, Run

        return (
            flags.Source(Refinement, panel="Training: what is computed"),
            flags.Source(Run, without=_UNUSED, panel="Run: how this machine computes it"),
        )


def refine(
    ctx: typer.Context,
    teacher: options.DenseModel,
    student: options.CompressedModel,
    out: options.Out,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_links: options.AllowLinks = False,
) -> None:
    """Train the factors of a checkpoint towards the dense model's predictions.

    The training uses the calibration of the checkpoint's recipe unless you give another one. If
    that recipe names a text file or a dataset, name it again with `--calibration`, because svdserve
    does not read files on the word of a checkpoint. A part of the sequences is held out, and the
    factors that are written are never worse there than those of the given checkpoint.
    """
    options.grant(trust_remote_code=trust_remote_code, allow_links=allow_links)
    given = flags.given(ctx)
    with resumable(out):
        from svdserve.compression.model.hub import resolve_model
        from svdserve.compression.pipeline.recipe import Refinement, Run, make_run
        from svdserve.compression.pipeline.stages.refine import check_own_calibration
        from svdserve.compression.pipeline.stages.refine import refine as run_refinement

        settings, run = given.make(Refinement), make_run(**given.of(Run))
        directory = resolve_model(student)
        check_own_calibration(directory, settings)
        report = run_refinement(teacher, directory, out, settings, run)
    tell_if_complete(report)
    typer.echo(f"{report.directory}: {held_out_divergence(report)}")
