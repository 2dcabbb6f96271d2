"""The work directory of a job, ``OUT.partial``: its finished results, and the atomic last step.

Every file appears by a rename after an fsync, so that all files are complete even after a kill.
"""

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from svdserve.compression.format.integrity import write_sums
from svdserve.compression.format.log import LOG_FILE, log_event, read_log
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.schema import ModuleSpec
from svdserve.compression.format.tensors import save_tensors
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.pipeline.recipe import Recipe, Run
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import (
    check_output,
    exclusive,
    make_folder,
    remove_temporaries,
    sync_folder,
    write_json,
)
from svdserve.compression.system.memory import release

_JOB = "job.json"
_TOKENS = "calibration.safetensors"
_PUBLISHED = "published.json"
_REORDERED = "reordered"


Signature = dict[str, dict[str, Any]]
"""Everything that determines the bytes of an output: JSON values by section and name."""


class _Published(BaseModel):
    """The event ``published``, which ends the log of an output."""

    job: Signature
    facts: dict[str, Any]


class WorkDirectory:
    """Holds the finished blocks of one job until its checkpoint is complete.

    Args:
        out: the output directory.
        resume: go on with an unfinished job.
        force: replace the content of ``out``.
        inputs: files and directories that the job reads; ``out`` must not contain them.
        resume_anyway: go on even if the order of sums has changed, and record the change.

    Raises:
        UserError: ``out`` cannot be written (``check_output``), or is not empty and ``force`` is
            False.
    """

    def __init__(
        self,
        out: Path,
        *,
        resume: bool,
        force: bool,
        inputs: Collection[Path] = (),
        resume_anyway: bool = False,
    ) -> None:
        check_output(out, inputs)
        out = out.resolve() if out.is_symlink() else out
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self._resume, self._force = resume or resume_anyway, force
        self._anyway = resume_anyway
        self.reordered: list[dict[str, Any]] = []
        """All changes of the order of sums in this job, each with ``before`` and ``after``."""
        self._check_kept()

    @classmethod
    def of(cls, out: Path, model: Path, recipe: Recipe, run: Run) -> Self:
        """The work directory of a compression of the model in the directory ``model``."""
        return cls(
            out,
            resume=run.resume,
            force=run.force,
            inputs=[model, *recipe.text_files],
            resume_anyway=run.resume_anyway,
        )

    def _check_kept(self) -> None:
        kept = self.out.is_dir() and any(self.out.iterdir()) and not self._force
        self._complete = kept and self._resume and not self.path.exists()
        # If a job is killed between publishing and cleaning up, the output is its own.
        published = self._resume and (self.path / _PUBLISHED).exists()
        if kept and not self._complete and not published:
            raise UserError(
                f"{self.out}: is not empty; give another --out or --force to replace it"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside the block, no other process writes this output.

        Raises:
            UserError: another process is writing the output, or has written it meanwhile.
        """
        make_folder(self.out.parent)
        with exclusive(self.out):
            self._check_kept()
            if self.path.exists():
                remove_temporaries(self.path, "**/*")
            yield

    @property
    def _done(self) -> Path:
        """Path to which the work directory is renamed before it is removed."""
        return self.path.with_name(self.path.name + ".done")

    @property
    def log(self) -> Path:
        return self.path / LOG_FILE

    @property
    def rest(self) -> Path:
        """The file of the tensors outside the blocks."""
        return self.path / "rest.safetensors"

    def block(self, index: int) -> Path:
        return self.path / f"block-{index:05d}.safetensors"

    def finished(self, blocks: int) -> int:
        """Number of finished blocks, counted from the first block."""
        return next((i for i in range(blocks) if not self.block(i).exists()), blocks)

    def open(self, signature: Signature) -> dict[str, Any] | None:
        """Start a job, or resume a job of the same signature.

        Returns:
            None; or the facts given to ``publish`` if the output is complete. A complete output may
            differ from ``signature`` in the order of sums.

        Raises:
            UserError: there is an unfinished job and ``resume`` is False, or its signature differs.
        """
        self._signature = signature
        job = self.path / _JOB
        shutil.rmtree(self._done, ignore_errors=True)
        if self._complete:
            return self._finished_output()
        if self._force and not self._resume:
            shutil.rmtree(self.path, ignore_errors=True)
        if not job.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(job, signature)
        elif not self._resume:
            raise UserError(
                f"{self.path}: holds an unfinished job; add --resume to go on or --force to start "
                "over"
            )
        else:
            self._go_on(job, signature)
        return None

    def _go_on(self, job: Path, signature: Signature) -> None:
        """Compare an unfinished job with the signature; record a change of the order of sums."""
        known = read_json(job)
        self.reordered = known.get(_REORDERED, [])
        if self._anyway and known.get("order") != signature.get("order"):
            before, after = known.get("order"), signature.get("order")
            self.reordered.append({"before": before, "after": after})
            known["order"] = after
        _refuse_changes(self.path, known, signature)
        write_json(job, known | ({_REORDERED: self.reordered} if self.reordered else {}))

    def _finished_output(self) -> dict[str, Any]:
        events = read_log(self.out / LOG_FILE)
        *_, last = [{}, *(event for event in events if event.get("event") == "published")]
        try:
            published = _Published.model_validate(last)
        except ValidationError:
            raise UserError(
                f"{self.out}: there is nothing to resume, and its log does not name the job that "
                "wrote it; give another --out, or --force without --resume to replace it"
            ) from None
        parts = {name: fields for name, fields in self._signature.items() if name != "order"}
        _refuse_changes(self.out, published.job, parts)
        return published.facts

    def tokens(self, draw: Callable[[], Tensor]) -> Tensor:
        """The calibration tokens of this job, which are drawn once and stored for a resume."""
        path = self.path / _TOKENS
        if not path.exists():
            save_tensors({"tokens": draw()}, path)
            release()
        tokens: Tensor = load_file(path)["tokens"]
        return tokens

    def save_block(
        self, index: int, tensors: dict[str, Tensor], specs: dict[str, ModuleSpec]
    ) -> None:
        """Store a finished block; its tensors are written last, as they mark it as finished."""
        path = self.block(index)
        fields = {name: spec.model_dump(mode="json", by_alias=True) for name, spec in specs.items()}
        write_json(path.with_suffix(".json"), fields)
        save_tensors(tensors, path)

    def load_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, ModuleSpec]]:
        path = self.block(index)
        fields = read_json(path.with_suffix(".json"))
        try:
            specs = {name: ModuleSpec.model_validate(values) for name, values in fields.items()}
            return load_file(path), specs
        except (SafetensorError, ValidationError) as error:
            raise UserError(f"{path}: is damaged; remove it and resume ({error})") from None

    def final(self) -> Path:
        """An empty folder for the complete checkpoint."""
        final = self.path / "final"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        return final

    def publish(self, final: Path, facts: dict[str, Any]) -> None:
        """Rename ``final`` to the output; the old output is removed once the new one is in place.

        If the job is killed in between, resuming it publishes again. The log ends with the job's
        signature and ``facts``, which ``open`` returns if the same job is requested again.

        Raises:
            UserError: a reader would refuse ``final``; then nothing is renamed.
        """
        try:
            check_finite(open_checkpoint(final))
        except UserError as error:
            raise UserError(
                f"internal fault, nothing is written to {self.out}: {error}; {self.path} keeps "
                "the results: please report this fault"
            ) from None
        old, done = self.out.with_name(self.out.name + ".replaced"), self._done
        log_event(final / LOG_FILE, "published", job=self._signature, facts=facts)
        write_sums(final)
        sync_folder(final)
        write_json(self.path / _PUBLISHED, {})
        for rest in (old, done):
            shutil.rmtree(rest, ignore_errors=True)
        if self.out.exists():
            self.out.rename(old)
        final.rename(self.out)
        sync_folder(self.out.parent)
        self.path.rename(done)
        for rest in (old, done):
            shutil.rmtree(rest, ignore_errors=True)


def _refuse_changes(where: Path, old: dict[str, Any], new: Signature) -> None:
    for part, fields in new.items():
        for name, value in fields.items():
            before = old.get(part, {}).get(name)
            if before != value:
                anyway = "go on with --resume-anyway, " if part == "order" else ""
                raise UserError(
                    f"{where}: cannot resume, {part}.{name} was {before!r} and is {value!r}; "
                    f"restore the old value, {anyway}or start over with --force and without "
                    "--resume"
                )


def execution_fingerprint(device: torch.device, batch_size: int) -> dict[str, Any]:
    """The settings that determine the order of sums, and so the last digits of a result."""
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "torch": torch.__version__,
    }
