"""The stage that backpropagates the teacher's loss through all blocks: gradients and spectra."""

import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from svdserve.compression.pipeline.plan import Plan, not_finite
from svdserve.compression.pipeline.progress import Progress
from svdserve.compression.statistics.cache import cache_folder, sweeping
from svdserve.compression.statistics.gradients import BoundaryGradients, stacked_weights
from svdserve.compression.statistics.spectra import Spectra
from svdserve.compression.system.memory import release


@dataclass(frozen=True)
class Sweep:
    """Gradients at the block boundaries, or None, and the spectra of the modules, or none."""

    gradients: BoundaryGradients | None
    spectra: dict[str, Tensor]


def shared_folder(plan: Plan, tokens: Tensor, own: Path) -> Path:
    """The folder for files that do not depend on the student: the run's cache, or ``own``."""
    if plan.run.cache is None:
        return own
    settings = {
        "order": plan.signature["order"],
        "dtype": str(plan.dtype),
        "precision": plan.recipe.precision,
        "gradients": plan.recipe.gradient_rows(len(tokens)),
        "seed": plan.recipe.seed,
    }
    return cache_folder(plan.run.cache, plan.skeleton, tokens, settings)


def sweep(plan: Plan, tokens: Tensor, own: Path, progress: Progress) -> Sweep:
    """Compute the gradients and spectra that the plan needs, unless they are stored already.

    Args:
        tokens: calibration tokens [N, L].
        own: the folder of this job.

    Raises:
        UserError: hidden states or gradients are not finite.
    """
    if not plan.needs_gradients:
        return Sweep(None, {})
    folder, skeleton = shared_folder(plan, tokens, own), plan.skeleton
    with sweeping(folder):
        gradients = BoundaryGradients(folder, plan.recipe.gradient_rows(len(tokens)))
        spectra = None
        if plan.needs_spectra:
            groups = [
                {
                    group.path: [(m.name, m.rows) for m in block if m.group == group]
                    for group in skeleton.groups[index]
                }
                for index, block in enumerate(plan.modules)
            ]
            spectra = Spectra(folder / plan.recipe.grouping, groups)

        def done(index: int, block: nn.Module) -> None:
            begun = time.perf_counter()
            if spectra is not None:
                spectra.finish(index, stacked_weights(block, skeleton.groups[index]))
            progress.gradients(index, time.perf_counter() - begun)
            release()

        if not (gradients.complete and (spectra is None or spectra.complete)):
            watch = None if spectra is None else spectra.watch
            try:
                gradients.sweep(skeleton, tokens, plan.device, plan.recipe.seed, watch, done)
            except FloatingPointError as error:
                raise not_finite(str(error), gradients.dtype) from None
        return Sweep(gradients, {} if spectra is None else spectra.read())
