"""The compression job: checks, resumes, drives the walk and writes the checkpoint. No mathematics.

The work directory ``OUT.partial`` holds one safetensors file per finished block. A resumed job
carries the streams over the finished blocks with their stored factors and goes on, so that its
files are byte for byte those of an uninterrupted run.
"""

import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdserve.compression import allocation
from svdserve.compression.calibration import calibration_tokens, check_calibration
from svdserve.compression.checkpoint import LOG_FILE, merge_shards, read_json
from svdserve.compression.errors import UserError
from svdserve.compression.factors import Factors, interpolative
from svdserve.compression.linalg import relative_error
from svdserve.compression.methods import get_method
from svdserve.compression.progress import Progress
from svdserve.compression.recipe import Recipe, Run, dump_recipe
from svdserve.compression.schema import CheckpointConfig, ModuleSpec
from svdserve.compression.skeleton import Group, Skeleton, resolve_model
from svdserve.compression.statistics import Statistics
from svdserve.compression.walk import BlockPass, Walk

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_REST = "rest.safetensors"


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
    """One factored module to be: its name in the model, its linears and its planned rank."""

    group: Group
    name: str
    members: tuple[str, ...]
    rank: int | None


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
    """One compression with its work directory. ``execute`` runs or resumes it."""

    def __init__(self, model: str, out: Path, recipe: Recipe, run: Run) -> None:
        self.recipe, self.run, self.out = recipe, run, out
        self.work = out.with_name(out.name + ".partial")
        _check_output(out, run)
        self.method = get_method(recipe.method)
        self.skeleton = Skeleton(resolve_model(model))
        self.base_model = model if not Path(model).is_dir() else Path(model).resolve().name
        if self.method.statistics:
            check_calibration(self.skeleton.directory, recipe)
        self.device = _device(run.device)
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        self.dtype = (
            self.skeleton.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        )
        self.plan = self._plan()
        self.signature = {
            "recipe": recipe.model_dump(mode="json"),
            "weights": self._weights_digest(),
            "order": {
                "device": str(self.device),
                "threads": torch.get_num_threads(),
                "batch_size": run.batch_size,
                "torch": torch.__version__,
            },
        }

    def execute(self) -> Report:
        started = time.perf_counter()
        self._open_work()
        tokens = self._tokens()
        modules: dict[str, ModuleSpec] = {}
        with Progress(self.work / LOG_FILE, self.skeleton.blocks, self.run.progress) as progress:
            progress.truncate(self._finished_blocks())
            progress.event("start", model=self.base_model, **self.signature)
            walk = Walk(
                self.skeleton,
                tokens,
                self.method.statistics,
                self.dtype,
                self.device,
                self.run.batch_size,
                self.run.offload,
            )
            for index in range(self.skeleton.blocks):
                path = self._block_file(index)
                if path.exists():
                    modules |= self._replay(walk, index)
                else:
                    modules |= self._factor(walk, index, progress)
                progress.block(index, peak_bytes())
            self._write_rest()
            report = self._report(modules, tokens.numel(), time.perf_counter() - started)
            progress.event(
                "done",
                seconds=report.seconds,
                peak_bytes=report.peak_bytes,
                tokens=report.tokens,
                stored_parameters=report.stored_parameters,
                dense_parameters=report.dense_parameters,
            )
        self._publish(modules)
        return report

    # Planning

    def _plan(self) -> list[list[Unit]]:
        """The units of every block, with the ranks that the allocator gives."""
        shapes: dict[str, tuple[int, int]] = {}
        units: list[list[tuple[Group, str, tuple[str, ...]]]] = []
        for index, groups in enumerate(self.skeleton.groups):
            block = self.skeleton.layers[index]
            units.append([])
            for group in groups:
                parent = block.get_submodule(group.parent)
                for name, members in self._split(index, group):
                    sizes = [tuple(parent.get_submodule(m).weight.shape) for m in members]
                    shapes[name] = (sum(m for m, _ in sizes), sizes[0][1])
                    units[-1].append((group, name, members))
        ranks = allocation.uniform(shapes, self.recipe.layout, self.recipe.keep)
        return [[Unit(g, name, m, ranks[name]) for g, name, m in block] for block in units]

    def _split(self, index: int, group: Group) -> Iterator[tuple[str, tuple[str, ...]]]:
        prefix = self.skeleton.block_name(index)
        if self.recipe.grouping == "shared":
            yield f"{prefix}.{group.path}", group.members
        else:
            for member in group.members:
                yield f"{prefix}.{group.parent}.{member}", (member,)

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
            collected = time.perf_counter()
            for unit in self.plan[index]:
                if unit.group != group:
                    continue
                spec, facts = self._solve(block, unit, statistics, tensors)
                if spec is not None:
                    specs[unit.name] = spec
                progress.solved(
                    index, unit.name, **facts, pass_seconds=round(collected - begun, 4)
                )
        block.finish()
        self._write_block(index, tensors, specs)
        return specs

    def _solve(
        self, block: BlockPass, unit: Unit, statistics: Statistics, tensors: dict[str, Tensor]
    ) -> tuple[ModuleSpec | None, dict[str, Any]]:
        """Factor one unit, put it into the student and among the tensors of the block."""
        if unit.rank is None:
            return None, {"rank": None, "error": 0.0, "beta": None}
        begun = time.perf_counter()
        weights = [block.weight(unit.group, member) for member in unit.members]
        weight = torch.cat(weights).double()
        solution = self.method.solve(weight, statistics, unit.rank, self.recipe.parameters)
        factors = solution.factors
        if self.recipe.layout == "interpolative":
            factors = interpolative(factors)
        factors = factors.to(self.dtype)
        spec = ModuleSpec(
            members=unit.members,
            layout=factors.layout,
            rank=factors.rank,
            in_features=weight.shape[1],
            out_features=tuple(w.shape[0] for w in weights),
        )
        for suffix in spec.tensors():
            tensors[f"{unit.name}.{suffix}"] = getattr(factors, suffix).cpu().contiguous()
        block.replace(unit.group, unit.name.rpartition(".")[2], spec, factors)
        gram = statistics.gram if statistics.gram is not None else statistics.teacher_gram
        error = relative_error(weight, factors.to(torch.float64).dense(), gram)
        seconds = round(time.perf_counter() - begun, 4)
        facts = {"rank": factors.rank, "error": error, "beta": None, **solution.facts}
        return spec, {**facts, "solve_seconds": seconds}

    def _replay(self, walk: Walk, index: int) -> dict[str, ModuleSpec]:
        """Carry the streams over a finished block with the factors that it stored."""
        stored = load_file(self._block_file(index))
        specs = {
            name: ModuleSpec.model_validate(fields)
            for name, fields in read_json(self._block_file(index).with_suffix(".json")).items()
        }
        if not walk.wanted:
            return specs
        block = walk.block(index)
        for group in block.groups:
            block.statistics(group, collect=False)
            for unit in self.plan[index]:
                if unit.group == group and unit.name in specs:
                    spec = specs[unit.name]
                    names = [f"{unit.name}.{suffix}" for suffix in spec.tensors()]
                    factors = Factors(*(stored[name] for name in names))
                    block.replace(group, unit.name.rpartition(".")[2], spec, factors)
        block.finish()
        return specs

    # Files

    def _block_file(self, index: int) -> Path:
        return self.work / f"block-{index:05d}.safetensors"

    def _finished_blocks(self) -> int:
        return sum(self._block_file(index).exists() for index in range(self.skeleton.blocks))

    def _open_work(self) -> None:
        """Start or resume the work directory."""
        job = self.work / "job.json"
        if self.run.force and not self.run.resume and self.work.exists():
            shutil.rmtree(self.work)
        if job.exists():
            if not self.run.resume:
                raise UserError(
                    f"{self.work}: holds an unfinished job; add --resume to go on or --force to "
                    "start over"
                )
            _refuse_changes(read_json(job), self.signature, self.work)
            return
        self.work.mkdir(parents=True, exist_ok=True)
        _write_atomically(job, json.dumps(self.signature, indent=2) + "\n")

    def _tokens(self) -> Tensor:
        """Calibration tokens, kept in the work directory so that a resumed job has the same."""
        if not self.method.statistics:
            return torch.empty(0, self.recipe.length, dtype=torch.int64)
        path = self.work / "calibration.safetensors"
        if not path.exists():
            tokens = calibration_tokens(self.skeleton.directory, self.recipe)
            _save_atomically({"tokens": tokens}, path)
        return load_file(path)["tokens"]

    def _write_block(
        self, index: int, tensors: dict[str, Tensor], specs: dict[str, ModuleSpec]
    ) -> None:
        prefix = self.skeleton.block_name(index)
        factored = {
            f"{name.rpartition('.')[0]}.{member}.weight"
            for name, spec in specs.items()
            for member in spec.members
        }
        dense = [
            name
            for name in self.skeleton.files.info
            if name.startswith(f"{prefix}.") and name not in factored
        ]
        path = self._block_file(index)
        fields = {name: spec.model_dump(mode="json", by_alias=True) for name, spec in specs.items()}
        # The block counts as finished when its tensors exist, so they come last.
        _write_atomically(path.with_suffix(".json"), json.dumps(fields, indent=1) + "\n")
        _save_atomically({**tensors, **self._cast(self.skeleton.files.load(dense))}, path)

    def _write_rest(self) -> None:
        blocks = tuple(f"{self.skeleton.block_name(i)}." for i in range(self.skeleton.blocks))
        names = [name for name in self.skeleton.files.info if not name.startswith(blocks)]
        _save_atomically(self._cast(self.skeleton.files.load(names)), self.work / _REST)

    def _cast(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors in the stored dtype; untouched where the recipe keeps the model's own."""
        if self.recipe.dtype == "auto":
            return tensors
        return {k: t.to(self.dtype) if t.is_floating_point() else t for k, t in tensors.items()}

    def _publish(self, modules: dict[str, ModuleSpec]) -> None:
        final = self.work / "final"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        source = self.skeleton.directory
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if not file.name.endswith(".safetensors.index.json"):
                    shutil.copy(file, final / file.name)
        parts = [self._block_file(index) for index in range(self.skeleton.blocks)]
        merge_shards([self.work / _REST, *parts], final)
        config = read_json(source / "config.json")
        if self.recipe.dtype != "auto":
            config.pop("torch_dtype", None)
            config["dtype"] = self.recipe.dtype
        config["quantization_config"] = CheckpointConfig(
            base_model=self.base_model,
            keep=self.recipe.keep,
            modules=modules,
            recipe=self.recipe.model_dump(mode="json"),
        ).dump()
        (final / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (final / "recipe.yaml").write_text(dump_recipe(self.recipe))
        shutil.copy(self.work / LOG_FILE, final / LOG_FILE)
        _replace_directory(final, self.out)
        shutil.rmtree(self.work)

    def _report(self, modules: dict[str, ModuleSpec], tokens: int, seconds: float) -> Report:
        stored = dense = 0
        for spec in modules.values():
            dense += spec.stacked * spec.in_features
            stored += sum(
                torch.Size(shape).numel()
                for suffix, shape in spec.tensors().items()
                if suffix != "pivots"
            )
        return Report(self.out, seconds, peak_bytes(), tokens, stored, dense)

    def _weights_digest(self) -> dict[str, int]:
        """Size of every weight file: enough to notice that the model was exchanged."""
        files = {info.file for info in self.skeleton.files.info.values()}
        return {file.name: file.stat().st_size for file in sorted(files)}


def peak_bytes() -> int:
    """Peak resident memory of this process so far (Linux counts ru_maxrss in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _check_output(out: Path, run: Run) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a directory to write")
    if out.is_dir() and any(out.iterdir()) and not run.force:
        raise UserError(f"{out}: is not empty; give another --out or add --force to replace it")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).splitlines() or ["unknown device"])[0]
        raise UserError(f"device {name!r} cannot be used here: {first}") from None
    return device


def _refuse_changes(old: dict[str, Any], new: dict[str, Any], work: Path) -> None:
    for part, fields in new.items():
        for name, value in fields.items():
            before = old.get(part, {}).get(name)
            if before != value:
                raise UserError(
                    f"{work}: cannot resume, {part}.{name} was {before!r} and is {value!r}; restore "
                    "it, or start over with --force"
                )


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _save_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _replace_directory(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; what stood there goes away only once the new one is in place."""
    old = target.with_name(target.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
