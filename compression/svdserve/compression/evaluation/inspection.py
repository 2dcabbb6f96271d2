"""`svdserve inspect`: rank, bytes and error of every module of a checkpoint."""

import math
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdserve.compression.format.legacy import role_of
from svdserve.compression.format.log import LOG_FILE, read_log
from svdserve.compression.format.reader import Checkpoint, open_checkpoint
from svdserve.compression.format.roles import ROLES, Role


class ModuleFacts(BaseModel):
    """One module: its stored tensors, and its error and β from the log.

    ``error`` is the relative error of the module's outputs on the calibration tokens, and ``beta``
    is the method's weight of the teacher's activations; None if the log does not have it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    role: Role
    layout: str
    rank: int | None
    dtype: str
    """The dtype of the stored weights."""
    full_rank: int
    parameters: int
    dense_parameters: int
    """Pivots and scales count as bytes, but not as parameters."""
    nbytes: int
    dense_nbytes: int
    error: float | None
    beta: float | None


class Inspection(BaseModel):
    """The modules in the order of the model, and the totals in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: str
    base_model: str
    keep: float
    modules: tuple[ModuleFacts, ...]
    factored_nbytes: int
    other_nbytes: int
    dense_equivalent_nbytes: int


def inspect_checkpoint(directory: Path) -> Inspection:
    """Describe a checkpoint from its headers, pivots and log, without reading weights.

    Raises:
        UserError: ``directory`` is no valid checkpoint.
    """
    checkpoint = open_checkpoint(directory)
    log = _log(directory / LOG_FILE)
    rows = [*_factored(checkpoint, log), *_dense(checkpoint)]
    stored = checkpoint.stored_bytes()
    return Inspection(
        directory=str(directory),
        base_model=checkpoint.config.base_model,
        keep=checkpoint.config.keep,
        modules=tuple(sorted(rows, key=_order)),
        factored_nbytes=stored["lowrank"],
        other_nbytes=stored["dense"],
        dense_equivalent_nbytes=stored["dense_equivalent"],
    )


def print_inspection(inspection: Inspection) -> None:
    """Print a table of the modules and one line of totals."""
    title = f"{inspection.directory}: {inspection.base_model}, κ = {inspection.keep:g}"
    int8 = any(row.dtype == "int8" for row in inspection.modules)
    # Text, because Table would read a name such as [red] from the checkpoint as markup.
    table = Table(title=Text(f"{title}, int8" if int8 else title))
    table.add_column("module", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    for heading in ("rank", "bytes", "dense bytes", "kept", "error", "β"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in inspection.modules:
        table.add_row(
            Text(row.module),
            row.layout,
            _cell(row.rank, "d"),
            f"{row.nbytes:,}",
            f"{row.dense_nbytes:,}",
            f"{row.nbytes / max(row.dense_nbytes, 1):.1%}",
            _cell(row.error, ".4f"),
            _cell(row.beta, ".2f"),
        )
    total = inspection.factored_nbytes + inspection.other_nbytes
    console = Console()
    console.print(table)
    console.print(
        f"{inspection.factored_nbytes:,} bytes of factors + {inspection.other_nbytes:,} bytes of "
        f"dense tensors = {total:,} bytes, {total / inspection.dense_equivalent_nbytes:.1%} of the "
        f"dense model's {inspection.dense_equivalent_nbytes:,}",
        highlight=False,
        soft_wrap=True,
    )


def _factored(
    checkpoint: Checkpoint, log: dict[str, dict[str, float | None]]
) -> Iterator[ModuleFacts]:
    for name, spec in checkpoint.config.modules.items():
        nbytes, dense_nbytes = checkpoint.bytes_of(name)
        logged = log.get(name, {})
        yield ModuleFacts(
            module=name,
            role=spec.role,
            layout=spec.layout,
            rank=spec.rank,
            dtype=_dtype(checkpoint, f"{name}.factor_in"),
            full_rank=min(spec.stacked, spec.in_features),
            parameters=spec.parameters()[0],
            dense_parameters=spec.parameters()[1],
            nbytes=nbytes,
            dense_nbytes=dense_nbytes,
            error=logged.get("error"),
            beta=logged.get("beta"),
        )


def _dense(checkpoint: Checkpoint) -> Iterator[ModuleFacts]:
    """The linears of the model's groups that are not factored.

    Versions 1 and 2 of the format do not list all of these, so they are recognised by name.
    """
    listed = checkpoint.config.linears
    for name, info in checkpoint.files.info.items():
        module, _, suffix = name.rpartition(".")
        role = listed[module].role if module in listed else role_of(module)
        if suffix == "weight" and (module in listed or role != "other"):
            nbytes, dense_nbytes = checkpoint.bytes_of(module)
            yield ModuleFacts(
                module=module,
                role=role,
                layout="dense",
                rank=None,
                dtype=_dtype(checkpoint, name),
                full_rank=min(info.shape),
                parameters=math.prod(info.shape),
                dense_parameters=math.prod(info.shape),
                nbytes=nbytes,
                dense_nbytes=dense_nbytes,
                error=None,
                beta=None,
            )


def _dtype(checkpoint: Checkpoint, tensor: str) -> str:
    return str(checkpoint.files.info[tensor].dtype).removeprefix("torch.")


def _log(path: Path) -> dict[str, dict[str, float | None]]:
    """Error and β from the last event ``group`` of every module."""
    return {
        str(entry.get("module")): {key: _finite(entry.get(key)) for key in ("error", "beta")}
        for entry in read_log(path)
        if entry.get("event") == "group"
    }


def _finite(value: object) -> float | None:
    """A finite number as float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _order(row: ModuleFacts) -> list[tuple[int, int, str]]:
    """Sort key: block 10 comes after block 9, and modules come in the order of the forward pass."""
    # The path without self_attn or mlp, which the role distinguishes.
    path = row.module.split(".")[:-2]
    numbers = [(int(part), 0, "") if part.isdigit() else (0, 0, part) for part in path]
    return [*numbers, (0, ROLES.index(row.role), row.module)]


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
