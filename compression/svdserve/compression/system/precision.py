"""In which precision matrix products are taken, while a caller asks for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]
_BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "sve_bf16")


@contextmanager
def float32_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """While inside: how products of float32 matrices are taken; sums are float32 in any case.

    ``bfloat16`` rounds the factors of a product to bfloat16 on a CPU, and to TensorFloat-32 on a
    GPU, where the processor has units for it.
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
    """While inside, no gradients, and a block's forward pass in ``precision``.

    On a CPU that multiplies bfloat16, ``bfloat16`` is torch's autocast: linears and attention read
    and write bfloat16, norms and the residual stream stay float32. Elsewhere it is what
    ``float32_products`` makes of it. No place for sums over tokens, which autocast would round.
    """
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    cast = precision == "bfloat16" and any(units.get(unit, False) for unit in _BFLOAT16_UNITS)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=cast):
        yield
