"""The public operation, and its counterpart for factors that are used in many calls."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from svdserve.kernels import reference
from svdserve.kernels.parts import (
    Activation,
    AnyPart,
    Int8Matrix,
    Int8Part,
    Part,
    PreparedFactors,
    check_bias,
    check_factors,
    check_input,
    check_int8,
    check_pivots,
    same_inputs,
)
from svdserve.kernels.registry import Request, choose
from svdserve.kernels.torch_library import define
from svdserve.kernels.triton.table import Table, table_of


def lowrank_linear(
    x: Tensor,
    factor_in: Tensor,
    factor_out: Tensor,
    pivots: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> Tensor:
    """y = W x + b for a rank-r weight W [m, n]; reference.py is the definition.

    This is one torch operation, ``svdserve::lowrank_linear``, which torch.compile and CUDA graphs
    support. If a gradient is needed, and under autocast, it is the definition instead, whose
    products torch differentiates and casts. ``prepare`` is faster for a layer that is called often.

    Args:
        x: [..., n], any strides.
        factor_in: [r, n], or [r, n - r] with pivots.
        factor_out: [m, r].
        pivots: [r] distinct channels of x (int32 or int64), or None for the pair layout. Their
            values are not checked, as that would wait for the device; ``prepare`` checks them.
        bias: [m] or None.
        implementation: the name of the implementation to use; None lets registry.py choose.

    Returns:
        [..., m] in the dtype of x, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        NoImplementation: the named implementation does not exist or cannot compute this.
    """
    part = Part(factor_in, factor_out, pivots)
    check_factors(part)
    if torch.is_autocast_enabled(x.device.type):
        return reference.lowrank_linear(x, factor_in, factor_out, pivots, bias)
    check_input(x, part.in_features, factor_in)
    check_bias(bias, part.outputs, x)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, factor_in, factor_out, bias)
    ):
        return reference.lowrank_linear(x, factor_in, factor_out, pivots, bias)
    return torch.ops.svdserve.lowrank_linear(  # type: ignore[no-any-return]
        x, factor_in, factor_out, pivots, bias, implementation
    )


def prepare(
    parts: Sequence[AnyPart],
    *,
    activation: Activation | None = None,
    implementation: str | None = None,
    table: Table | None = None,
) -> PreparedFactors:
    """The same operation as a module, which packs or pads its factors once for many calls.

    Several parts read the same x, each with its own rank; their outputs are concatenated.

    Args:
        parts: one or more, on one device and in one dtype, all factored or none. Of int8 weights
            ``reference.int8_linear`` is the definition, and x is bfloat16.
        activation: None, or that of a gated MLP whose outputs are gate and up; see reference.gated.
        implementation: the name of the implementation to use; None lets registry.py choose.
        table: of measurements, by which to choose; None for the table of the device, if it has one.

    Returns:
        A module called with x and bias, for inference only.

    Raises:
        ValueError: shapes, dtypes, devices or pivots do not fit together, or an activation is
            wanted of an odd number of outputs.
        NoImplementation: the named implementation does not exist or cannot compute this.
    """
    for part in parts:
        if isinstance(part, Part):
            check_factors(part)
        else:
            check_int8(part)
        if isinstance(part, Part | Int8Part) and part.pivots is not None:
            check_pivots(part.pivots, part.in_features)
    same_inputs(parts)
    outputs = sum(part.outputs for part in parts)
    if activation and outputs % 2:
        raise ValueError(f"an activation of {outputs} outputs; give as many rows of gate as of up")
    request = Request.of(parts, prepared=True, activation=activation)
    table = table or table_of(request.device)
    chosen = choose(request, implementation, table)
    return chosen.prepare([_ascending(part) for part in parts], activation, table)


def _ascending(part: AnyPart) -> AnyPart:
    """The same weight with its pivots sorted."""
    if not isinstance(part, Part | Int8Part) or part.pivots is None:
        return part
    if bool((part.pivots.diff() > 0).all()):
        return part
    pivots, order = part.pivots.sort()
    if isinstance(part, Part):
        return Part(part.factor_in[order], part.factor_out[:, order], pivots)
    (rows, row_scale), (columns, scale) = part.factor_in, part.factor_out
    inner = Int8Matrix(rows[order], row_scale[order])
    return Int8Part(inner, Int8Matrix(columns[:, order], scale), pivots)


def _run(
    x: Tensor,
    factor_in: Tensor,
    factor_out: Tensor,
    pivots: Tensor | None,
    bias: Tensor | None,
    implementation: str | None,
) -> Tensor:
    parts = [Part(factor_in, factor_out, pivots)]
    table = table_of(x.device.type)
    rows = x.shape[:-1].numel()
    chosen = choose(Request.of(parts, prepared=False, rows=rows), implementation, table)
    return chosen.prepare(parts, None, table)(x, bias)  # type: ignore[no-any-return]


def _fake(
    x: Tensor,
    factor_in: Tensor,
    factor_out: Tensor,
    pivots: Tensor | None,
    bias: Tensor | None,
    implementation: str | None,
) -> Tensor:
    del factor_in, pivots, bias, implementation
    return x.new_empty(*x.shape[:-1], factor_out.shape[0])


def _operations(
    x: torch.Size, factor_in: torch.Size, factor_out: torch.Size, *_: object, **__: object
) -> int:
    """Floating-point operations, for FlopCounterMode, which cannot see inside the operation."""
    return 2 * x[:-1].numel() * (factor_in.numel() + factor_out.numel())


define(
    "lowrank_linear(Tensor x, Tensor factor_in, Tensor factor_out, Tensor? pivots, Tensor? bias, "
    "str? implementation) -> Tensor",
    _run,
    _fake,
)
register_flop_formula(torch.ops.svdserve.lowrank_linear)(_operations)
