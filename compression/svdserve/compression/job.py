"""The compression job: checks, resumes, drives the walk and writes the checkpoint. No mathematics.

The work directory ``OUT.partial`` holds one safetensors file per finished block. A resumed job
carries the streams over the finished blocks with their stored factors and goes on, so that its
files are byte for byte those of an uninterrupted run.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdserve.compression.allocation import Budget, Module, Ranks, get_allocator
from svdserve.compression.calibration import calibration_tokens, check_calibration
from svdserve.compression.card import model_card
from svdserve.compression.checkpoint import LOG_FILE, merge_shards, read_json
from svdserve.compression.errors import UserError
from svdserve.compression.factors import Factors, interpolative
from svdserve.compression.gradients import BoundaryGradients, stacked_weights
from svdserve.compression.linalg import relative_error
from svdserve.compression.machine import usable_device
from svdserve.compression.memory import peak_bytes, release
from svdserve.compression.methods import get_method
from svdserve.compression.methods.learner import Learner
from svdserve.compression.profile import Profile
from svdserve.compression.progress import Progress
from svdserve.compression.recipe import Recipe, Run, dump_recipe
from svdserve.compression.schema import GROUPS, CheckpointConfig, ModuleSpec, linears_of
from svdserve.compression.scores import Learned, learn
from svdserve.compression.skeleton import Group, Skeleton, resolve_model
from svdserve.compression.statistics import OF_GRADIENTS, Statistics
from svdserve.compression.walk import BlockPass, Walk
from svdserve.compression.workdir import WorkDirectory, parameters_of, save_tensors, summation

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Report:
    """What a finished job did."""

    directory: Path
    seconds: float
    peak_bytes: int
    tokens: int
    stored_parameters: int
    dense_parameters: int


@dataclass(frozen=True)
class Unit:
    """One factored module to be: its name in the model, its linears, and the rows [m] of the
    group's stacked weight [m, n] that are theirs."""

    group: Group
    name: str
    members: tuple[str, ...]
    rows: slice
    columns: int


def compress(model: str, out: Path, recipe: Recipe, run: Run | None = None) -> Report:
    """Factor a Hugging Face model and write the checkpoint to ``out``.

    Args:
        model: a directory with safetensors, or a Hub name.
        out: the checkpoint directory; it appears when it is complete, in one rename.
        recipe: what to compute.
        run: how; defaults to the CPU.

    Raises:
        UserError: anything wrong with the input, found before the long part starts.
    """
    return Job(model, out, recipe, run or Run()).execute()


class Job:
    """One compression with its work directory. ``execute`` runs or resumes it.

    Args:
        ranks: given, with the ``tokens``, where the closed form of a learned method is wanted.
    """

    learned: Learned | None = None

    def __init__(
        self,
        model: str,
        out: Path,
        recipe: Recipe,
        run: Run,
        ranks: Ranks | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        self.recipe, self.run = recipe, run
        self.work = WorkDirectory(out, resume=run.resume, force=run.force)
        self.method = get_method(recipe.method)
        self.skeleton = Skeleton(resolve_model(model))
        self.base_model = model if not Path(model).is_dir() else Path(model).resolve().name
        self.allocator = get_allocator(recipe.allocator)
        self.tokens, self.learner, self.statistics = tokens, None, self.method.statistics
        learner = self.method.make_learner(recipe.parameters)
        if ranks is None and learner is not None and recipe.keep < 1:
            learner.training(recipe.seed).check_sequences(recipe.sequences)
            self.learner, self.statistics = learner, frozenset()
        self.uses_gradients = bool(self.statistics & OF_GRADIENTS) or self.allocator.profile
        self.uses_tokens = bool(self.statistics) or self.uses_gradients or self.learner is not None
        if self.uses_tokens:
            check_calibration(self.skeleton.directory, recipe)
        self.device = usable_device(run.device)
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        self.dtype = self.skeleton.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        self.units = [self._units(index) for index in range(self.skeleton.blocks)]
        planned_later = self.allocator.profile or self.learner is not None
        self.ranks = ranks or ({} if planned_later else self._allocate({}))
        self.signature = {
            "recipe": recipe.model_dump(mode="json"),
            # Sizes are enough to notice that the model was exchanged.
            "weights": {file.name: file.stat().st_size for file in self.skeleton.files.paths},
            "order": summation(self.device, run.batch_size),
        }

    def execute(self) -> Report:
        started = time.perf_counter()
        self.work.open(self.signature)
        specs: dict[str, ModuleSpec] = {}
        finished = self.work.finished(self.skeleton.blocks)
        if self.learner is not None:
            self._learn(self.learner)
        with Progress(self.work.log, self.skeleton.blocks, self.run.progress) as progress:
            progress.truncate(finished)
            progress.event("start", model=self.base_model, **self.signature)
            if self.learned is not None:
                progress.event("scores", **asdict(self.learned.state))
            tokens = self._tokens()
            gradients = self._sweep(tokens, progress) if self.uses_gradients else None
            walk = Walk(
                self.skeleton,
                tokens,
                self.statistics,
                self.dtype,
                self.device,
                self.run.batch_size,
                self.run.offload,
                gradients,
            )
            for index in range(self.skeleton.blocks):
                if index < finished:
                    specs |= self._replay(walk, index)
                else:
                    specs |= self._factor(walk, index, progress)
                progress.block(index, peak_bytes())
            stored, dense = parameters_of(specs)
            seconds = round(time.perf_counter() - started, 3)
            report = Report(self.work.out, seconds, peak_bytes(), tokens.numel(), stored, dense)
            progress.event("done", **{k: v for k, v in asdict(report).items() if k != "directory"})
        self._publish(specs)
        return report

    # Planning

    def _units(self, index: int) -> list[Unit]:
        """What will be factored in a block, in the order of its groups."""
        prefix, units = self.skeleton.block_name(index), []
        for group in self.skeleton.groups[index]:
            parent = self.skeleton.layers[index].get_submodule(group.parent)
            shapes = [parent.get_submodule(m).get_parameter("weight").shape for m in group.members]
            if self.recipe.grouping == "shared":
                rows, columns = slice(0, sum(s[0] for s in shapes)), shapes[0][1]
                units.append(Unit(group, f"{prefix}.{group.path}", group.members, rows, columns))
                continue
            start = 0
            for member, (size, columns) in zip(group.members, shapes, strict=True):
                name, rows = f"{prefix}.{group.parent}.{member}", slice(start, start + size)
                units.append(Unit(group, name, (member,), rows, columns))
                start += size
        return units

    def _allocate(self, profile: dict[str, Tensor]) -> Ranks:
        """The rank of every unit; ``profile`` as Profile.read returns it."""
        modules = {}
        for index, units in enumerate(self.units):
            for unit in units:
                curvature = profile.get(f"{unit.name}.curvature")
                modules[unit.name] = Module(
                    out_features=unit.rows.stop - unit.rows.start,
                    in_features=unit.columns,
                    block=index,
                    attention="o_proj" in unit.group.members or "q_proj" in unit.group.members,
                    energies=profile.get(f"{unit.name}.energies"),
                    curvature=None if curvature is None else float(curvature),
                    losses=profile.get(f"{unit.name}.losses"),
                    scores=profile.get(f"{unit.name}.scores"),
                )
        budget = Budget(self.recipe.keep, self.recipe.layout, self.recipe.rank_multiple)
        return self.allocator.function(modules, budget, **self.recipe.allocator_parameters)

    def _sweep(self, tokens: Tensor, progress: Progress) -> BoundaryGradients:
        """Gradients at the block boundaries and, where the allocator asks, the ranks."""
        gradients = BoundaryGradients(self.work.path, self.recipe.gradient_sequences)
        groups = [
            {name: [(u.name, u.rows) for u in units if u.group.name == name] for name in GROUPS}
            for units in self.units
        ]
        profile = Profile(self.work.path, groups) if self.allocator.profile else None

        def done(index: int, block: nn.Module) -> None:
            progress.gradients(index)
            if profile is not None:
                profile.finish(index, stacked_weights(block, self.skeleton.groups[index]))
            release()

        if not gradients.complete:
            watch = None if profile is None else profile.watch
            gradients.sweep(self.skeleton, tokens, self.device, self.recipe.seed, watch, done)
        if profile is not None:
            self.ranks = self._allocate(profile.read())
        return gradients

    def _learn(self, learner: Learner) -> None:
        """All components of every unit, as a checkpoint of full rank; then which of them stay."""
        path, tokens = self.work.path / "components", self._tokens()
        run = self.run.model_copy(update={"resume": True, "force": False})
        if not path.exists():
            whole = self.recipe.model_copy(update={"layout": "pair", "dtype": "float32"})
            units = [unit for block in self.units for unit in block]
            full: Ranks = {u.name: min(u.rows.stop - u.rows.start, u.columns) for u in units}
            Job(str(self.skeleton.directory), path, whole, run, full, tokens).execute()
        teacher, folder = self.skeleton.directory, self.work.path / "scores"
        self.learned = learn(
            teacher, path, tokens, self.recipe, learner, self._allocate, run, folder
        )
        self.ranks = self.learned.selection.ranks

    # Blocks

    def _factor(self, walk: Walk, index: int, progress: Progress) -> dict[str, ModuleSpec]:
        block = walk.block(index)
        specs: dict[str, ModuleSpec] = {}
        tensors: dict[str, Tensor] = {}
        for group in block.groups:
            progress.group(index, group.path)
            begun = time.perf_counter()
            try:
                statistics = block.statistics(group)
            except FloatingPointError as error:
                raise UserError(
                    f"{self.skeleton.block_name(index)}.{group.path}: {error}; use another dtype"
                ) from None
            release()
            collected = time.perf_counter()
            for unit in self.units[index]:
                if unit.group != group:
                    continue
                spec, facts = self._solve(block, unit, statistics.of_rows(unit.rows), tensors)
                if spec is not None:
                    specs[unit.name] = spec
                progress.solved(index, unit.name, **facts, pass_seconds=round(collected - begun, 4))
            release()
        block.finish()
        tensors |= self._dense(self._dense_names(index, specs))
        self.work.save_block(index, tensors, specs)
        return specs

    def _solve(
        self, block: BlockPass, unit: Unit, statistics: Statistics, tensors: dict[str, Tensor]
    ) -> tuple[ModuleSpec | None, dict[str, Any]]:
        """Factor one unit, put it into the student and among the tensors of the block."""
        rank = self.ranks[unit.name]
        if rank is None:
            return None, {"rank": None, "error": 0.0, "beta": None}
        begun = time.perf_counter()
        weights = [block.weight(unit.group, member) for member in unit.members]
        weight = torch.cat(weights).double()
        if self.learned is not None:
            solution = self.learned.solve(unit.name)
        else:
            solution = self.method.solve(weight, statistics, rank, self.recipe.parameters)
        factors = solution.factors
        if self.recipe.layout == "interpolative":
            factors = interpolative(factors)
        seconds = round(time.perf_counter() - begun, 4)
        factors = factors.to(self.dtype)
        spec = ModuleSpec(
            members=unit.members,
            layout=factors.layout,
            rank=factors.rank,
            **{"in": weight.shape[1]},
            out=tuple(w.shape[0] for w in weights),
        )
        for suffix in spec.tensors():
            tensors[f"{unit.name}.{suffix}"] = getattr(factors, suffix).cpu().contiguous()
        block.replace(unit.group, unit.name.rpartition(".")[2], spec, factors)
        gram = statistics.gram if statistics.gram is not None else statistics.teacher_gram
        error = relative_error(weight, factors.to(torch.float64).dense(), gram)
        facts = {"rank": factors.rank, "error": error, "beta": None, **solution.facts}
        return spec, {**facts, "solve_seconds": seconds}

    def _replay(self, walk: Walk, index: int) -> dict[str, ModuleSpec]:
        """Carry the streams over a finished block with the factors that it stored."""
        stored, specs = self.work.load_block(index)
        if not walk.wanted:
            return specs
        block = walk.block(index)
        for group in block.groups:
            block.statistics(group, collect=False)
            for unit in self.units[index]:
                if unit.group == group and unit.name in specs:
                    spec = specs[unit.name]
                    names = [f"{unit.name}.{suffix}" for suffix in spec.tensors()]
                    factors = Factors(*(stored[name] for name in names))
                    block.replace(group, unit.name.rpartition(".")[2], spec, factors)
        block.finish()
        return specs

    # Files

    def _tokens(self) -> Tensor:
        if not self.uses_tokens:
            return torch.empty(0, self.recipe.length, dtype=torch.int64)
        given, source = self.tokens, self.skeleton.directory
        return self.work.tokens(
            lambda: calibration_tokens(source, self.recipe) if given is None else given
        )

    def _dense(self, names: list[str]) -> dict[str, Tensor]:
        """Unfactored tensors, in the stored dtype where the recipe names one."""
        tensors = self.skeleton.files.load(names)
        if self.recipe.dtype == "auto":
            return tensors
        return {k: t.to(self.dtype) if t.is_floating_point() else t for k, t in tensors.items()}

    def _dense_names(self, index: int, specs: dict[str, ModuleSpec]) -> list[str]:
        factored = {f"{li}.weight" for name, spec in specs.items() for li in linears_of(name, spec)}
        prefix = f"{self.skeleton.block_name(index)}."
        names = self.skeleton.files.info
        return [name for name in names if name.startswith(prefix) and name not in factored]

    def _publish(self, specs: dict[str, ModuleSpec]) -> None:
        """Put the finished blocks, the rest and the metadata together as a checkpoint."""
        blocks = range(self.skeleton.blocks)
        prefixes = tuple(f"{self.skeleton.block_name(index)}." for index in blocks)
        rest = [name for name in self.skeleton.files.info if not name.startswith(prefixes)]
        save_tensors(self._dense(rest), self.work.rest)
        final, source = self.work.final(), self.skeleton.directory
        merge_shards([self.work.rest, *map(self.work.block, blocks)], final)
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if not file.name.endswith(".safetensors.index.json"):
                    shutil.copy(file, final / file.name)
        config = read_json(source / "config.json")
        if self.recipe.dtype != "auto":
            config.pop("torch_dtype", None)
            config["dtype"] = self.recipe.dtype
        config["quantization_config"] = CheckpointConfig(
            base_model=self.base_model,
            keep=self.recipe.keep,
            modules=specs,
            recipe=self.recipe.model_dump(mode="json"),
        ).dump()
        (final / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (final / "recipe.yaml").write_text(dump_recipe(self.recipe))
        card = model_card(self.base_model, self.recipe, specs, *parameters_of(specs))
        (final / "README.md").write_text(card)
        shutil.copy(self.work.log, final / LOG_FILE)
        self.work.publish(final)
