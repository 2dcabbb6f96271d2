"""RMSNorm of the models that svdserve's loader changes, on CPU, by vLLM's own C++ operations.

vLLM 0.32 compiles them for CPU, but runs eight torch operations for each norm instead
(vllm/ir/ops/layernorm.py). These take a noticeable part of a small model's step. In compiled mode
Inductor fuses them, so this module is for eager mode.

Interface: IrOp.register_impl and set_default in vllm/ir/op.py.
"""

import torch
from torch import Tensor
from vllm import ir
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

PROVIDER = "svdserve"
_VECTOR = 8  # the operations refuse a number of channels that is no multiple of it


def register_norms() -> None:
    """Register the operations with vLLM, once in a process; no model uses them yet."""
    if not current_platform.is_cpu():
        return
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes)(_rms_norm)
    add = ir.ops.fused_add_rms_norm
    add.register_impl(PROVIDER, supports_args=_takes_both, inplace=True)(_fused_add_rms_norm)


def prefer_norms(vllm_config: VllmConfig) -> None:
    """Let the models of this worker use the operations in place of vLLM's torch operations.

    A later worker in the same process starts from vLLM's choice again.
    """
    if not current_platform.is_cpu():
        return
    if vllm_config.compilation_config.mode == CompilationMode.NONE:
        for operation in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
            if operation.get_priority() == ["native"]:
                operation.set_default([PROVIDER, "native"])


def _takes(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    del epsilon
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype
        and x.shape[-1] % _VECTOR == 0
        and x.is_contiguous()  # the operations do not look at strides
    )


def _rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    del variance_size
    y = torch.empty_like(x)
    torch.ops._C.rms_norm(y, x, weight, epsilon)
    return y


def _takes_both(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return (
        x_residual is not x  # the operation writes both
        and x_residual.shape == x.shape
        and x_residual.dtype == x.dtype
        and x_residual.is_contiguous()
        and _takes(x, weight, epsilon, variance_size)
    )


def _fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    del variance_size
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
