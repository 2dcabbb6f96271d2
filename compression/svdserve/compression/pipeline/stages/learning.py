"""The stage that learns which singular components of the whole model to keep (learned methods).

The student is a checkpoint of full rank that transformers loads. Its factors are frozen, and its
latents are multiplied by functions of the scores. The held-out divergence is measured for the
selection that the current scores give under the exact budget. The stage returns the scores of least
held-out divergence. The initial scores select at least the components of uniform truncation, so the
result is never worse than that on the held-out sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from svdserve.compression.allocation import Ranks
from svdserve.compression.format.codecs import FLOAT, Storage
from svdserve.compression.format.layouts import Factors, Layout, get_layout
from svdserve.compression.format.tensors import TensorFiles
from svdserve.compression.methods.learner import Learner
from svdserve.compression.methods.registry import Solution
from svdserve.compression.model.loading import load_model
from svdserve.compression.model.modules import FactoredWeight
from svdserve.compression.pipeline.modules import ModulePlan
from svdserve.compression.pipeline.progress import bar
from svdserve.compression.pipeline.recipe import Recipe, Run
from svdserve.compression.statistics.moments import Statistics
from svdserve.compression.system.memory import release
from svdserve.compression.training.distillation import Distillation, Targets
from svdserve.compression.training.trainer import Objective, State, Trainer

Allocate = Callable[[dict[str, Tensor]], Ranks]
"""Computes ranks under the exact budget from ``<module>.scores`` of all modules."""


_SMALLEST = torch.finfo(torch.float32).eps / 2


def _column_norms(matrix: Tensor) -> Tensor:
    """Positive norms [k] of the float32 columns of a matrix; all 1 if the matrix is zero.

    Squares of very small or large weights leave the range of float32, so the matrix is first scaled
    by a power of two, which does not round.
    """
    exponent = max(-100, min(int(torch.frexp(matrix.abs().max()).exponent), 100))
    norms = torch.ldexp(matrix, torch.tensor(-exponent)).norm(dim=0)
    norms = norms.clamp_min(_SMALLEST * float(norms.max()))
    norms = norms.where(norms > 0, torch.ones_like(norms))
    return torch.ldexp(norms, torch.tensor(exponent))


@dataclass(frozen=True)
class Selection:
    """The components that scores select under the budget.

    Args:
        ranks: the rank r of each module; None if it stays dense.
        kept: indices of the kept components, by module.
        scales: factors [k] of the components, by module; 0 for dropped components.
    """

    ranks: Ranks
    kept: dict[str, Tensor]
    scales: dict[str, Tensor]


@dataclass(frozen=True)
class Learned:
    """The result of the learning, from which ``solve`` computes the factors of each module.

    Attributes:
        components: the tensors of the checkpoint of full rank.
        selection: the selected components.
        state: the state of the training at its end.
    """

    components: TensorFiles
    selection: Selection
    state: State

    def solve(
        self, module: ModulePlan, _weight: Tensor, _statistics: Statistics, _rank: int
    ) -> Solution:
        """Float64 factors of a module's kept components, and the error of dropping the rest."""
        name = module.name
        names = [f"{name}.factor_in", f"{name}.factor_out"]
        inner, outer = (t.double() for t in self.components.load(names).values())
        scale, kept = self.selection.scales[name].double(), self.selection.kept[name]
        sigma = outer.norm(dim=0)
        factor_in = inner[kept] * (scale * sigma)[kept, None]
        energy = sigma * (inner != 0).any(dim=1)  # zero components have columns of norm 1
        lost, whole = float(((1 - scale) * energy).norm()), float(energy.norm())
        factor_out = outer[:, kept] / sigma.where(sigma > 0, torch.ones_like(sigma))[kept]
        return Solution(Factors(factor_in, factor_out), {"error": lost / whole if whole else 0.0})


class Components:
    """The K components of all modules of a student of full rank.

    Args:
        student: a model loaded from a checkpoint of full rank.
        keep, layout: keep ratio and layout of the recipe. They give the uniform ranks, which define
            strength and price of the components (learner.py).
        allocate: computes ranks under the exact budget.
    """

    def __init__(self, student: nn.Module, keep: float, layout: Layout, allocate: Allocate) -> None:
        found = {n: m for n, m in student.named_modules() if isinstance(m, FactoredWeight)}
        self.modules, self.keep, self._allocate = found, keep, allocate
        self.sizes = [module.rank for module in found.values()]
        strengths, prices = [], []
        for module in found.values():
            m, n, k = module.out_features, module.in_features, module.rank
            uniform = layout.rank_for_keep(m, n, keep) or k
            sigma = _column_norms(module.matrix("factor_out", torch.float32).detach().float())
            strengths.append(sigma / sigma[uniform - 1].clamp_min(_SMALLEST * float(sigma.max())))
            # The mean cost of the uniform rank's components, because in the interpolative layout
            # the cost of one more component falls with the rank, to nothing.
            prices.append(torch.full_like(sigma, layout.parameters(m, n, uniform) / uniform))
        dense = sum(module.out_features * module.in_features for module in found.values())
        self.strength, self.price = torch.cat(strengths), torch.cat(prices) / dense

    def scale(self, amplitudes: Tensor) -> None:
        """Set the factors [K] that multiply the components."""
        for module, part in zip(
            self.modules.values(), torch.split(amplitudes, self.sizes), strict=True
        ):
            module.component_scale = part

    def select(self, scores: Tensor, learner: Learner) -> Selection:
        """Select the most important components of each module, as many as its rank under budget."""
        order = torch.split(learner.order(scores, self.strength).cpu(), self.sizes)
        factors = torch.split(learner.kept(scores).cpu(), self.sizes)
        ranks = self._allocate({f"{n}.scores": o for n, o in zip(self.modules, order, strict=True)})
        chosen, scales = {}, {}
        for name, importance, scale in zip(self.modules, order, factors, strict=True):
            best = importance.argsort(descending=True, stable=True)[: ranks[name]]
            chosen[name] = best.sort().values
            scales[name] = torch.zeros_like(scale).index_copy(0, best, scale[best])
            if ranks[name] is None:
                scales[name] = torch.ones_like(scale)
        return Selection(ranks, chosen, scales)


class ScoreObjective:
    """Objective (trainer.py): the divergence ``base`` plus the learner's penalty.

    Args:
        components: the components of the student of ``base``.
        learner: the rules of the method.
        base: the divergence from the teacher.
    """

    def __init__(self, components: Components, learner: Learner, base: Objective) -> None:
        self.components, self.learner, self.base = components, learner, base
        self._start, self._reach = (
            rule(components.strength) for rule in (learner.start, learner.reach)
        )
        self.moves = nn.Parameter(torch.zeros_like(self._start))
        """The trained parameter [K]: scores = start + reach · moves."""
        self.steps, self.unit = 1, 1.0
        """Number of steps of the training, and the divergence that is the penalty's unit."""

    def scores(self, moves: Tensor) -> Tensor:
        return self._start + self._reach * moves

    def selection(self, moves: Tensor) -> Selection:
        return self.components.select(self.scores(moves.to(self._start.device)), self.learner)

    def backward(self, rows: Tensor, step: int) -> None:
        progress = step / self.steps
        self.moves.data.clamp_(min=-self._start / self._reach)
        scores = self.scores(self.moves)
        self.components.scale(self.learner.amplitudes(scores, progress))
        self.base.backward(rows, step)
        price, keep = self.components.price, self.components.keep
        penalty = self.learner.penalty(self.scores(self.moves), price, keep, progress)
        torch.autograd.backward(self.unit * penalty)

    @torch.no_grad()
    def evaluate(self, rows: Tensor) -> float:
        scales = self.selection(self.moves).scales.values()
        self.components.scale(torch.cat(list(scales)).to(self.moves.device))
        return self.base.evaluate(rows)


def learn(
    teacher: Path,
    components: Path,
    tokens: Tensor,
    recipe: Recipe,
    learner: Learner,
    allocate: Allocate,
    run: Run,
    folder: Path,
) -> Learned:
    """Learn the scores; goes on from the state in ``folder`` if there is one.

    Args:
        teacher: the dense model.
        components: its checkpoint of full rank, in the layout ``pair`` and float32.
        tokens: calibration tokens [N, L].
        recipe, learner: the recipe, and the rules of its method.
        allocate: computes ranks under the exact budget.
        run: device and gradient checkpointing.
        folder: the folder for the teacher's targets and the state of the training.
    """
    folder.mkdir(exist_ok=True)
    settings, device = learner.training(recipe.seed), torch.device(run.device)
    targets = Targets(folder / "targets")
    with bar(run.progress) as shown:
        task = shown.add_task("teacher", total=len(tokens), facts="")
        targets.compute(
            teacher, tokens, device, settings, lambda done: shown.update(task, completed=done)
        )
        student = load_model(components, "float32", run.device).requires_grad_(False)
        if run.checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        spectrum = Components(student, recipe.keep, get_layout(recipe.layout), allocate)
        for module in spectrum.modules.values():
            module.to(getattr(torch, settings.precision))  # once, instead of autocast at every call
        base = Distillation(student, tokens, targets, settings)
        objective = ScoreObjective(spectrum, learner, base)
        trained, stored = {"moves": objective.moves}, {"moves": Storage(FLOAT, torch.float32)}
        trainer = Trainer(trained, stored, objective, settings, len(tokens), folder)
        objective.steps, objective.unit = trainer.steps, trainer.held_out_loss()
        task = shown.add_task("scores", total=trainer.steps, facts="")

        def notify(step: int, state: State) -> None:
            facts = f"held-out KL {state.before:.4f}, best {state.best:.4f}"
            shown.update(task, completed=step, facts=facts)

        state = trainer.train(notify)
    selection = objective.selection(trainer.best()["moves"])
    del student, spectrum, base, objective, trainer
    release()
    return Learned(TensorFiles(components), selection, state)
