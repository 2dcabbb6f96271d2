"""RMSNorm through vLLM's interface: the C++ operations where they can, its own chain where not."""

import pytest
import torch
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform

from svdserve.server.plugin.norms import PROVIDER
from svdserve.server.plugin.plugin import register

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="of vLLM's CPU engine")

EPSILON = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Two roundings to the dtype: of what is normalized, and of its product with the weight.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()
    current_platform.import_kernels()


def expected(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight.double()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, want: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (7, 40), (3, 5, 64), (33, 2048)])
def test_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = random(*shape, seed=1).to(dtype), random(*shape, seed=2).to(dtype)
    weight = random(shape[-1], seed=3).to(dtype)
    with ir.ops.rms_norm.set_priority([PROVIDER, "native"]):
        assert ir.ops.rms_norm.dispatch(x, weight, EPSILON).provider == PROVIDER
        assert_close(ir.ops.rms_norm(x, weight, EPSILON), expected(x, weight))
    with ir.ops.fused_add_rms_norm.set_priority([PROVIDER, "native"]):
        arguments = (x.clone(), residual.clone(), weight, EPSILON)
        assert ir.ops.fused_add_rms_norm.dispatch(*arguments).provider == PROVIDER
        y, added = ir.ops.fused_add_rms_norm.maybe_inplace(*arguments)
        kept = x.clone(), residual.clone()
        functional, _ = ir.ops.fused_add_rms_norm(*kept, weight, EPSILON)
    assert torch.equal(functional, y)
    assert torch.equal(kept[0], x)
    assert torch.equal(kept[1], residual)
    assert torch.equal(added, x + residual)
    assert_close(y, expected(x.double() + residual.double(), weight))


def test_what_the_operations_can_not_take_goes_to_vllm() -> None:
    x, weight = random(6, 32), random(32, seed=1)
    odd: list[tuple[Tensor, Tensor | None, int | None]] = [
        (random(6, 36), random(36), None),
        (random(6, 64)[:, :32], weight, None),
        (x, None, None),
        (x.bfloat16(), weight, None),
        (x, weight, 16),
    ]
    with ir.ops.rms_norm.set_priority([PROVIDER, "native"]):
        for given, scale, size in odd:
            assert ir.ops.rms_norm.dispatch(given, scale, EPSILON, size).provider == "native"
    with ir.ops.fused_add_rms_norm.set_priority([PROVIDER, "native"]):
        for residual in (random(32, 6).T, random(1, 32), x.double(), x, x.clone()):
            chosen = ir.ops.fused_add_rms_norm.dispatch(x, residual, weight, EPSILON)
            fits = residual is not x and torch.equal(residual, x) and residual.dtype == x.dtype
            assert chosen.provider == (PROVIDER if fits else "native")
