"""Context managers that set the precision of matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]
_BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "sve_bf16")


@contextmanager
def float32_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Set the precision of products of float32 matrices inside the block; sums stay float32.

    ``bfloat16`` rounds both operands to bfloat16 on a CPU and to TensorFloat-32 on a GPU, if the
    processor has units for that. ``float32`` rounds nothing.
    """
    before = torch.get_float32_matmul_precision()
    reduced = "high" if device.type == "cuda" else "medium"
    torch.set_float32_matmul_precision(reduced if precision == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def forward_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run a forward pass in ``precision`` inside the block, without gradients.

    On a CPU with bfloat16 units, ``bfloat16`` turns on torch's autocast: linears and attention read
    and write bfloat16, while norms and the residual stream stay float32. On other devices products
    keep the precision that ``float32_products`` has set. Sums over tokens must stay outside the
    block, because autocast would round them.
    """
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    cast = precision == "bfloat16" and any(units.get(unit, False) for unit in _BFLOAT16_UNITS)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=cast):
        yield
