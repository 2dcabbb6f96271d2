"""The implementations of the low-rank linear, and which of them a call or a layer gets.

The first of ``IMPLEMENTATIONS`` that can compute it and was measured to be worth it on the device
is taken; what was not measured there is taken only by name, which the environment variable
SVDSERVE_KERNEL or the argument ``implementation`` gives. docs/kernels.md says how to add one.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from svdserve.kernels import cpu
from svdserve.kernels.parts import Activation, Part, PreparedFactors
from svdserve.kernels.products import TwoProducts
from svdserve.kernels.triton.configs import config_for
from svdserve.kernels.triton.table import Table, table_of

OVERRIDE = "SVDSERVE_KERNEL"


class NoImplementation(ValueError):
    """None, or not the one asked for, can compute a call; the message lists all and why."""


@dataclass(frozen=True)
class Request:
    """What an implementation is asked to compute.

    Attributes:
        device: type of device, such as "cuda", which is also AMD's.
        dtype: of x and the factors.
        columns: of every factor: n - r or n, and r, for each part.
        prepared: whether the factors may be packed before, once for many calls.
        activation: that of a gated MLP, to be applied to the outputs; None for the outputs.
        rows: of x; None where factors are prepared for calls of any number.
    """

    device: str
    dtype: torch.dtype
    columns: tuple[int, ...]
    prepared: bool
    activation: Activation | None = None
    rows: int | None = None

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        *,
        prepared: bool,
        activation: Activation | None = None,
        rows: int | None = None,
    ) -> "Request":
        first = parts[0].factor_in
        columns = tuple(f.shape[1] for part in parts for f in (part.factor_in, part.factor_out))
        return cls(first.device.type, first.dtype, columns, prepared, activation, rows)

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
        name: as SVDSERVE_KERNEL gives it.
        devices: types of devices; empty for all.
        dtypes: of x and the factors; empty for all.
        why_not: the reason against a request on such a device and dtype, None if there is none.
        prepare: packs parts that were checked, with ascending pivots where prepared, for outputs or
            for an activation of them; by the table of the card, if it has one.
        unmeasured: why nobody who did not ask for it gets it, by that table; None if they do.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[Request], str | None]
    prepare: Callable[[Sequence[Part], Activation | None, Table | None], PreparedFactors]
    unmeasured: Callable[[Request, Table | None], str | None] = _nothing

    def reason_against(self, request: Request) -> str | None:
        """Why it cannot compute the request; None if it can."""
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


def _cpu(parts: Sequence[Part], activation: Activation | None, _: Table | None) -> PreparedFactors:
    return cpu.PackedFactors(*parts[0], activation=activation)


def _not_triton(request: Request) -> str | None:
    # Decided without importing Triton, which takes long, where there is no GPU.
    if request.device == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "0":
        return "needs a GPU, or TRITON_INTERPRET=1 for its slow interpreter"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not request.prepared and any(columns % 16 for columns in request.columns):
        return "pads factors to multiples of 16 columns, which pays only where prepare() does it"
    return _no_activation(request)


def _triton(parts: Sequence[Part], _: Activation | None, table: Table | None) -> PreparedFactors:
    from svdserve.kernels.triton.linear import TritonFactors

    request = Request.of(parts, prepared=True)
    return TritonFactors(parts, table.plan(request.dtype, request.columns) if table else None)


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


def _torch(parts: Sequence[Part], _: Activation | None, __: Table | None) -> PreparedFactors:
    return TwoProducts(parts)


_HALF = (torch.bfloat16, torch.float16)
IMPLEMENTATIONS = (
    Implementation("cpu", ("cpu",), (torch.bfloat16,), _not_cpu, _cpu),
    Implementation(
        "triton",
        ("cuda", "cpu"),
        (*_HALF, torch.float32),
        _not_triton,
        _triton,
        _unmeasured_triton,
    ),
    Implementation("torch", (), (), _no_activation, _torch),
)


def choose(request: Request, name: str | None = None, table: Table | None = None) -> Implementation:
    """The implementation for a request.

    Args:
        request: what is to be computed.
        name: of the one to take; None for SVDSERVE_KERNEL, or, where that is unset, the first that
            was measured to be worth it.
        table: of what was measured; None for that of the device.

    Raises:
        NoImplementation: the named one does not exist or cannot compute it.
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
    """By name, why implementations do not compute a request; those that would are not in it.

    Arguments and errors are those of ``choose``. What is asked for by name needs no measurements.
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
    """All that decides, beside a request, what runs: for keys of caches of compiled graphs.

    Args:
        device: type of device.
        dtype: of x and the factors.

    Returns:
        What was asked for, what can run here, the table of the card and the processor's
        instructions, as JSON has them.

    Raises:
        ValueError: the table of the device is damaged.
    """
    request = Request(device, dtype, (16, 16), prepared=True)
    table = table_of(device)
    return {
        "override": asked_for() or "",
        "kernels": [i.name for i in IMPLEMENTATIONS if i.reason_against(request) is None],
        "table": table and table.model_dump(mode="json"),
        "processor": sorted(u for u, has in torch.cpu.get_capabilities().items() if has is True),
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
