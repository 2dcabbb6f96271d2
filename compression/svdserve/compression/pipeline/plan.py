"""The first stage: plan a compression and check its input before the long part starts."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from svdserve.compression.allocation import get_allocator
from svdserve.compression.format.codecs import Storage, revisions
from svdserve.compression.format.tensors import check_finite_tensors
from svdserve.compression.methods import get_method
from svdserve.compression.methods.learner import Learner
from svdserve.compression.model.containers import require_walkable
from svdserve.compression.model.hub import model_name
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.calibration.tokens import (
    calibration_digests,
    calibration_tokens,
    check_calibration,
)
from svdserve.compression.pipeline.modules import Modules, plan_modules, plan_storage
from svdserve.compression.pipeline.progress import bar
from svdserve.compression.pipeline.ranks import check_reachable, is_searched, plan_ranks
from svdserve.compression.pipeline.recipe import Recipe, Run
from svdserve.compression.pipeline.workdir import Signature, WorkDirectory, execution_fingerprint
from svdserve.compression.statistics.moments import needing_gradients, without_gradients
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import check_folder
from svdserve.compression.system.machine import usable_device
from svdserve.compression.system.memory import bound_kernel_cache


@dataclass(frozen=True)
class Plan:
    """What one compression computes, and how.

    Attributes:
        skeleton: the dense model.
        modules: the modules, which are factored or stay dense.
        storage: codec and dtype of each module, by name.
        dtype: the dtype of stored hidden states.
        device: the device that runs blocks.
        base_model: the name of the dense model.
        statistics: the names of the statistics that the method reads.
        learner: the Learner of a learned method, else None.
        needs_spectra: whether the allocator compares the modules' spectra.
        measures: whether the error behind every block is measured even if the method does not need
            both streams.
    """

    recipe: Recipe
    run: Run
    skeleton: Skeleton
    modules: Modules
    storage: dict[str, Storage]
    dtype: torch.dtype
    device: torch.device
    base_model: str
    statistics: frozenset[str]
    learner: Learner | None
    needs_spectra: bool
    measures: bool = False

    @property
    def needs_gradients(self) -> bool:
        return bool(needing_gradients(self.statistics)) or self.needs_spectra

    @cached_property
    def signature(self) -> Signature:
        """Everything that determines the bytes of the output; reads the calibration texts once."""
        texts = [self.recipe, *(text for _, text in self.recipe.trainings)]
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "weights": {
                "model": self.skeleton.files.fingerprint,
                **revisions([self.recipe.weights]),
            },
            "texts": calibration_digests(texts),
            "order": execution_fingerprint(self.device, self.run.batch_size),
        }

    def of(self, recipe: Recipe, run: Run, *, measures: bool = False) -> "Plan":
        """The plan of another recipe's closed form for the same model and device."""
        return _planned(self.skeleton, recipe, run, self.device, self.base_model, measures)


def make_plan(directory: Path, recipe: Recipe, run: Run) -> Plan:
    """Plan a compression, and check its input except for the values of the weights.

    Raises:
        UserError: model, recipe, calibration text or device cannot be used.
    """
    bound_kernel_cache()
    skeleton = Skeleton(directory)
    for folder in filter(None, (run.offload, run.cache)):
        check_folder(folder)
    learner = get_method(recipe.method).make_learner(recipe.parameters)
    if learner is not None and recipe.keep < 1:
        learner.training(recipe.seed).check_sequences(recipe.sequences)
    if recipe.calibrated:
        check_calibration(directory, recipe)
    for settings, text in recipe.trainings:
        check_calibration(directory, text)
        settings.check_sequences(text.sequences)
    device = usable_device(run.device)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    _check_cast(skeleton, recipe)
    plan = _planned(skeleton, recipe, run, device, model_name(directory), False)
    check_reachable(plan.modules, recipe)
    if recipe.keep < 1 and learner is not None:
        return replace(plan, learner=learner, statistics=frozenset())
    if not plan.needs_spectra and not is_searched(recipe):
        plan_ranks(plan.modules, recipe, {})
    return plan


def _planned(
    skeleton: Skeleton,
    recipe: Recipe,
    run: Run,
    device: torch.device,
    base_model: str,
    measures: bool,
) -> Plan:
    modules = plan_modules(skeleton, recipe.grouping)
    statistics = get_method(recipe.method).needs(recipe.parameters)
    needs_spectra = get_allocator(recipe.allocator).needs_spectra
    if recipe.keep == 1:  # every linear stays dense, so gradients are of no use
        statistics, needs_spectra = without_gradients(statistics), False
    return Plan(
        recipe=recipe,
        run=run,
        skeleton=skeleton,
        modules=modules,
        storage=plan_storage(skeleton, modules, recipe),
        dtype=skeleton.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype),
        device=device,
        base_model=base_model,
        statistics=statistics,
        learner=None,
        needs_spectra=needs_spectra,
        measures=measures or recipe.block_refinement is not None,
    )


def _check_cast(skeleton: Skeleton, recipe: Recipe) -> None:
    """Refuse weights that overflow the recipe's dtype; reads the weights only for float16.

    Raises:
        UserError: a weight overflows; the message names the first such tensor.
    """
    if recipe.dtype != "float16":
        return
    limit = torch.finfo(torch.float16).max
    for name, info in skeleton.files.info.items():
        if info.dtype.is_floating_point and info.dtype != torch.float16:
            low, high = skeleton.files.load([name])[name].float().aminmax()
            if max(-float(low), float(high)) > limit:
                raise UserError(
                    f"{name}: holds {max(-float(low), float(high)):.3g}, but the largest number of "
                    f"float16 is {limit:g}; give --dtype bfloat16 or float32"
                )


def check_model(plan: Plan) -> None:
    """Check before the long part that weights are finite and that blocks can run piecewise.

    Raises:
        UserError: a weight is not finite, or the walk cannot run a block piecewise.
    """
    files = plan.skeleton.files
    with bar(plan.run.progress) as shown:
        total = sum(info.nbytes for info in files.info.values())
        task = shown.add_task("checking the weights", total=total, facts="")
        check_finite_tensors(files, lambda done: shown.update(task, completed=done))
    if plan.recipe.calibrated:
        require_walkable(plan.skeleton, plan.device)


def calibrate(plan: Plan, work: WorkDirectory, given: Tensor | None = None) -> Tensor:
    """The calibration tokens [N, L] of a job, which stay the same after a resume.

    Args:
        given: tokens to use instead of drawing some.
    """
    recipe = plan.recipe
    if not recipe.calibrated:
        return torch.empty(0, recipe.length, dtype=torch.int64)

    def draw() -> Tensor:
        if given is not None:
            return given
        directory, shown = plan.skeleton.directory, plan.run.progress
        return calibration_tokens(directory, recipe, plan.device, progress=shown)

    tokens = work.tokens(draw)
    for settings, text in recipe.trainings:
        if text == recipe:
            settings.check_sequences(len(tokens))  # a short text gives fewer than requested
    return tokens


def not_finite(message: str, dtype: torch.dtype) -> UserError:
    """The UserError for a FloatingPointError in a pass over the tokens.

    ``check_model`` has found that all weights are finite.

    Args:
        message: the place, and what is not finite.
        dtype: the dtype of stored hidden states.
    """
    if dtype == torch.float16:
        return UserError(f"{message}; values overflow float16: give --dtype bfloat16 or float32")
    return UserError(
        f"{message}; all weights are finite, so activations or their squares overflow float32: "
        "the model cannot be calibrated on this text; give another --calibration"
    )
