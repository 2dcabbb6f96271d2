"""The implementations of the low-rank linear, and which of them a call or a layer gets.

It gets the first of ``IMPLEMENTATIONS`` that can compute it and for which measurements on the
device show a gain. An implementation without such measurements runs only if the environment
variable SVDSERVE_KERNEL or the argument ``implementation`` names it. docs/kernels.md says how to
add an implementation.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from svdserve.kernels import cpu
from svdserve.kernels.parts import (
    Activation,
    AnyPart,
    Int8Matrix,
    Part,
    PreparedFactors,
    WholePart,
    last,
)
from svdserve.kernels.products import TwoProducts
from svdserve.kernels.triton.configs import config_for
from svdserve.kernels.triton.table import Table, table_of

OVERRIDE = "SVDSERVE_KERNEL"


class NoImplementation(ValueError):
    """No implementation, or not the named one, can compute a call; the message says why of each."""


@dataclass(frozen=True)
class Request:
    """What an implementation is asked to compute.

    Attributes:
        device: the type of device, such as "cuda" (also for AMD's GPUs).
        dtype: of x and the factors.
        columns: the number of columns of every factor: n - r or n, then r, for each part; of a
            weight that is not factored 0, then n.
        prepared: whether the factors may be packed once for many calls.
        activation: the activation of a gated MLP to apply to the outputs; None for none.
        rows: of x; None if factors are prepared for calls with any number of rows.
        weights: "int8" if the weights are integers with scales; x is bfloat16 then.
        whole: whether the weights are not factored.
    """

    device: str
    dtype: torch.dtype
    columns: tuple[int, ...]
    prepared: bool
    activation: Activation | None = None
    rows: int | None = None
    weights: Literal["float", "int8"] = "float"
    whole: bool = False

    @classmethod
    def of(
        cls,
        parts: Sequence[AnyPart],
        *,
        prepared: bool,
        activation: Activation | None = None,
        rows: int | None = None,
    ) -> "Request":
        first = last(parts[0])
        whole = isinstance(parts[0], WholePart)
        if any(isinstance(part, WholePart) != whole for part in parts):
            raise ValueError("parts of one layer must all be factored, or none")
        columns = tuple(count for part in parts for count in part.columns)
        int8 = isinstance(first, Int8Matrix)
        dtype = torch.bfloat16 if int8 else first.dtype
        return cls(
            first.device.type,
            dtype,
            columns,
            prepared,
            activation,
            rows,
            "int8" if int8 else "float",
            whole,
        )

    @property
    def parts(self) -> int:
        return len(self.columns) // 2


def _nothing(request: Request, table: Table | None) -> str | None:
    del request, table
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute the low-rank linear.

    Attributes:
        name: the value of SVDSERVE_KERNEL that chooses it.
        devices: the types of devices that it runs on; empty for all.
        dtypes: the dtypes of x and the factors that it supports; empty for all.
        why_not: why it cannot compute a request on such a device and dtype; None if it can.
        prepare: makes PreparedFactors of checked parts, whose pivots ascend if they are packed, for
            an activation or None, by the table of measurements of the GPU or None.
        unmeasured: why it is used only if it is named, given that table; None if it needs no name.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[Request], str | None]
    prepare: Callable[[Sequence[AnyPart], Activation | None, Table | None], PreparedFactors]
    unmeasured: Callable[[Request, Table | None], str | None] = _nothing

    def reason_against(self, request: Request) -> str | None:
        """Why this implementation cannot compute the request; None if it can."""
        if self.devices and request.device not in self.devices:
            return f"is for {' and '.join(self.devices)}"
        if self.dtypes and request.dtype not in self.dtypes:
            return f"is for {', '.join(map(_short, self.dtypes))}"
        return self.why_not(request)


def _not_cpu(request: Request) -> str | None:
    if not request.prepared:
        return "packs factors, which pays only where prepare() does it once"
    if request.parts > 1:
        return "computes one part at a time"
    return cpu.unsupported()


def _cpu(
    parts: Sequence[AnyPart], activation: Activation | None, _: Table | None
) -> PreparedFactors:
    (part,) = parts
    weights = (None, part.weight) if isinstance(part, WholePart) else part
    return cpu.PackedFactors(*weights, activation=activation)


def _unmeasured_cpu(request: Request, _: Table | None) -> str | None:
    # Processors without AMX count as one kind: one of them was measured (docs/kernels.md).
    if (request.weights == "int8" or request.whole) and torch.ops.svdserve.has_amx():
        return "was not measured for such weights on processors with AMX"
    return None


def _not_triton(request: Request) -> str | None:
    if reason := _not_factored_in_float(request):
        return reason
    # Without a GPU this is decided before Triton is imported, which takes long.
    if request.device == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "0":
        return "needs a GPU, or TRITON_INTERPRET=1 for its slow interpreter"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not request.prepared and any(columns % 16 for columns in request.columns):
        return "pads factors to multiples of 16 columns, which pays only where prepare() does it"
    return _no_activation(request)


def _not_torch(request: Request) -> str | None:
    return _not_factored_in_float(request) or _no_activation(request)


def _not_factored_in_float(request: Request) -> str | None:
    if request.weights == "float" and not request.whole:
        return None
    return "multiplies factors in floating point only"


def _factored(parts: Sequence[AnyPart]) -> list[Part]:
    return [part for part in parts if isinstance(part, Part)]


def _triton(parts: Sequence[AnyPart], _: Activation | None, table: Table | None) -> PreparedFactors:
    from svdserve.kernels.triton.linear import TritonFactors

    request = Request.of(parts, prepared=True)
    return TritonFactors(
        _factored(parts), table.plan(request.dtype, request.columns) if table else None
    )


def _unmeasured_triton(request: Request, table: Table | None) -> str | None:
    if table is None:
        return "has no table of measurements of this device"
    plan = table.plan(request.dtype, request.columns)
    if plan is None:
        return f"did not win, or was not measured, for such layers on {table.card}"
    if request.rows is not None and config_for(plan, request.rows).shrink is None:
        return f"did not win for {request.rows} rows on {table.card}"
    return None


def _no_activation(request: Request) -> str | None:
    return "leaves activations to the caller" if request.activation else None


def _torch(parts: Sequence[AnyPart], _: Activation | None, __: Table | None) -> PreparedFactors:
    return TwoProducts(_factored(parts))


_HALF = (torch.bfloat16, torch.float16)
IMPLEMENTATIONS = (
    Implementation("cpu", ("cpu",), (torch.bfloat16,), _not_cpu, _cpu, _unmeasured_cpu),
    Implementation(
        "triton",
        ("cuda", "cpu"),
        (*_HALF, torch.float32),
        _not_triton,
        _triton,
        _unmeasured_triton,
    ),
    Implementation("torch", (), (), _not_torch, _torch),
)


def choose(request: Request, name: str | None = None, table: Table | None = None) -> Implementation:
    """The implementation for a request.

    Args:
        request: what is to be computed.
        name: of the implementation; None for SVDSERVE_KERNEL, or, if that is unset, the first for
            which measurements show a gain.
        table: of measurements; None for the table of the device.

    Raises:
        NoImplementation: the named implementation does not exist or cannot compute the request.
        ValueError: the table of the device is damaged.
    """
    name, table = name or asked_for(), table or table_of(request.device)
    for implementation in IMPLEMENTATIONS:
        reason = _reason(implementation, request, name, table)
        if name in (None, implementation.name) and reason is None:
            return implementation
    can = {i.name: i.reason_against(request) or "can" for i in IMPLEMENTATIONS}
    raise NoImplementation(
        f"lowrank_linear of {_short(request.dtype)} on {request.device} cannot run as {name!r} "
        f"(from {OVERRIDE} or the argument implementation): "
        + "; ".join(f"{one} {reason}" for one, reason in can.items())
    )


def asked_for() -> str | None:
    """The implementation that SVDSERVE_KERNEL names; None if it names none."""
    return os.environ.get(OVERRIDE) or None


def reasons_against(
    request: Request, name: str | None = None, table: Table | None = None
) -> dict[str, str]:
    """The reason against each implementation that would not compute a request, by its name.

    Arguments and errors are those of ``choose``. A named implementation needs no measurements.
    """
    name, table = name or asked_for(), table or table_of(request.device)
    found = {i.name: _reason(i, request, name, table) for i in IMPLEMENTATIONS}
    return {name: reason for name, reason in found.items() if reason is not None}


def _reason(
    implementation: Implementation, request: Request, name: str | None, table: Table | None
) -> str | None:
    reason = implementation.reason_against(request)
    if reason is None and implementation.name != name:
        reason = implementation.unmeasured(request, table)
    return reason


def what_decides(device: str, dtype: torch.dtype) -> dict[str, object]:
    """Everything besides a request that decides what runs, for keys of caches of compiled graphs.

    Args:
        device: the type of device.
        dtype: of x and the factors.

    Returns:
        JSON values: the named implementation, the implementations that can run here, the table of
        the GPU, and the processor's instructions.

    Raises:
        ValueError: the table of the device is damaged.
    """
    request = Request(device, dtype, (16, 16), prepared=True)
    table = table_of(device)
    return {
        "override": asked_for() or "",
        "kernels": [i.name for i in IMPLEMENTATIONS if i.reason_against(request) is None],
        "table": table and table.model_dump(mode="json"),
        "amx": cpu.unsupported() is None and torch.ops.svdserve.has_amx(),
        "processor": sorted(u for u, has in torch.cpu.get_capabilities().items() if has is True),
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
