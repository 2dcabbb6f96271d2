"""The implementations of the low-rank linear, and which of them a call or a layer gets.

The first of ``IMPLEMENTATIONS`` that has no reason against it is taken. The environment variable
SVDSERVE_KERNEL, or the argument ``implementation``, names one instead. docs/kernels.md says how to
add one.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from svdserve.kernels import cpu
from svdserve.kernels.parts import Activation, Part, PreparedFactors
from svdserve.kernels.products import TwoProducts

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
    """

    device: str
    dtype: torch.dtype
    columns: tuple[int, ...]
    prepared: bool
    activation: Activation | None = None

    @classmethod
    def of(
        cls, parts: Sequence[Part], *, prepared: bool, activation: Activation | None = None
    ) -> "Request":
        first = parts[0].factor_in
        columns = tuple(f.shape[1] for part in parts for f in (part.factor_in, part.factor_out))
        return cls(first.device.type, first.dtype, columns, prepared, activation)

    @property
    def parts(self) -> int:
        return len(self.columns) // 2


@dataclass(frozen=True)
class Implementation:
    """One way to compute the low-rank linear.

    Attributes:
        name: as SVDSERVE_KERNEL gives it.
        devices: types of devices; empty for all.
        dtypes: of x and the factors; empty for all.
        why_not: the reason against a request on such a device and dtype, None if there is none.
        prepare: packs parts that were checked, with ascending pivots where prepared, for outputs or
            for an activation of them.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[Request], str | None]
    prepare: Callable[[Sequence[Part], Activation | None], PreparedFactors]

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


def _cpu(parts: Sequence[Part], activation: Activation | None) -> PreparedFactors:
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


def _triton(parts: Sequence[Part], _: Activation | None) -> PreparedFactors:
    from svdserve.kernels.triton.linear import TritonFactors

    return TritonFactors(parts)


def _no_activation(request: Request) -> str | None:
    return "leaves activations to the caller" if request.activation else None


def _torch(parts: Sequence[Part], _: Activation | None) -> PreparedFactors:
    return TwoProducts(parts)


_HALF = (torch.bfloat16, torch.float16)
IMPLEMENTATIONS = (
    Implementation("cpu", ("cpu",), (torch.bfloat16,), _not_cpu, _cpu),
    Implementation("triton", ("cuda", "cpu"), (*_HALF, torch.float32), _not_triton, _triton),
    Implementation("torch", (), (), _no_activation, _torch),
)


def choose(request: Request, name: str | None = None) -> Implementation:
    """The implementation for a request.

    Args:
        request: what is to be computed.
        name: of the one to take; None for SVDSERVE_KERNEL, or, where that is unset, the first.

    Raises:
        NoImplementation: the named one does not exist or cannot compute it.
    """
    name = name or os.environ.get(OVERRIDE) or None
    for implementation in IMPLEMENTATIONS:
        if name in (None, implementation.name) and implementation.reason_against(request) is None:
            return implementation
    against = reasons_against(request)
    listed = "; ".join(f"{i.name} {against.get(i.name, 'can')}" for i in IMPLEMENTATIONS)
    raise NoImplementation(
        f"lowrank_linear of {_short(request.dtype)} on {request.device} cannot run as {name!r} "
        f"(from {OVERRIDE} or the argument implementation): {listed}"
    )


def reasons_against(request: Request) -> dict[str, str]:
    """By name, why implementations cannot compute a request; those that can are not in it."""
    found = {i.name: i.reason_against(request) for i in IMPLEMENTATIONS}
    return {name: reason for name, reason in found.items() if reason is not None}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
