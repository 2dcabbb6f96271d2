"""The fused CPU kernel against the definition in float32."""

import pytest
import torch
from torch import Tensor

from fused_kernel import ENGINES, SHAPES, assert_close, needs_kernel
from svdserve.kernels import Activation, cpu, lowrank_linear, reference


def factors(m: int, n: int, r: int, *, pivots: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(m * n + r)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[1] ** 0.5).bfloat16()

    if not pivots:
        return random(r, n), random(m, r), None
    chosen = torch.randperm(n, generator=generator)[:r].sort().values
    return (
        random(r, n - r) if n > r else torch.empty(r, 0, dtype=torch.bfloat16),
        random(m, r),
        chosen,
    )


def expected(x: Tensor, factor_in: Tensor, factor_out: Tensor, pivots: Tensor | None) -> Tensor:
    """In float32, with z rounded to bfloat16 as every implementation stores it."""
    identity = torch.eye(factor_out.shape[1])
    z = lowrank_linear(x.float(), factor_in.float(), identity, pivots)
    return z.bfloat16().float() @ factor_out.float().T


@needs_kernel
@pytest.mark.parametrize("amx", ENGINES)
@pytest.mark.parametrize("tokens", [1, 2, 12, 13, 17, 32, 800])
@pytest.mark.parametrize("with_pivots", [True, False])
@pytest.mark.parametrize(("m", "n", "r"), [*SHAPES, (70, 1700, 40)])
def test_equals_the_definition(
    m: int, n: int, r: int, with_pivots: bool, tokens: int, amx: bool
) -> None:
    z, c, pivots = factors(m, n, r, pivots=with_pivots)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, n, generator=generator).bfloat16()
    bias = torch.randn(m, generator=generator).bfloat16()
    packed = cpu.PackedFactors(z, c, pivots, amx=amx)
    want = expected(x, z, c, pivots)
    assert_close(packed(x), want)
    assert_close(packed(x, bias), want + bias.float())


@needs_kernel
@pytest.mark.parametrize("amx", ENGINES)
@pytest.mark.parametrize("tokens", [1, 13, 32, 800])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("m", "n", "r"), [(2, 3, 1), (30, 33, 15), (32, 64, 33), (1280, 576, 301)])
def test_activations_equal_the_definition(
    m: int, n: int, r: int, activation: Activation, tokens: int, amx: bool
) -> None:
    z, c, pivots = factors(m, n, r, pivots=True)
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    packed = cpu.PackedFactors(z, 4 * c, pivots, activation=activation, amx=amx)
    assert_close(packed(x), reference.gated(expected(x, z, 4 * c, pivots), activation))
    assert packed(x[:0]).shape == (0, m // 2)


@needs_kernel
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_far_from_zero(activation: Activation) -> None:
    """Nothing overflows on the way, where the sigmoid is 0 or 1; a NaN stays one."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    packed = cpu.PackedFactors(one, torch.cat([one, one]), activation=activation)  # act(x) x
    x = torch.tensor([-3e38, -1e4, -200, -90, -1e-3, 0, 1e-3, 90, 200, 1e4]).bfloat16()[:, None]
    want = reference.gated(torch.cat([x, x], dim=1).float(), activation)
    got = packed(x).float()
    near = x.abs() < 1e5
    torch.testing.assert_close(got[near], want[near], rtol=2**-7, atol=1e-30)
    assert not got.isnan().any()
    assert packed(torch.full_like(x, torch.nan)).isnan().all()


@needs_kernel
def test_strides_and_leading_dimensions_of_x() -> None:
    z, c, pivots = factors(48, 100, 20, pivots=True)
    packed = cpu.PackedFactors(z, c, pivots)
    wide = torch.randn(6, 2, 250, generator=torch.Generator().manual_seed(0)).bfloat16()
    for x in (wide[:, :, 50:150], wide[..., :200:2], wide[:, 0, :100], wide[0, 0, :100]):
        got = packed(x)
        assert got.shape == (*x.shape[:-1], 48)
        assert_close(got, expected(x, z, c, pivots))
    assert packed(wide[:0, :, :100]).shape == (0, 2, 48)


@needs_kernel
@pytest.mark.parametrize("amx", ENGINES)
def test_many_tokens_share_no_scratch(amx: bool) -> None:
    """More tokens than one chunk holds give the same rows as each token alone."""
    z, c, pivots = factors(64, 96, 40, pivots=True)
    packed = cpu.PackedFactors(z, c, pivots, amx=amx)
    x = torch.randn(1700, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    together = packed(x)
    for token in (0, 767, 768, 1535, 1536, 1699):
        assert torch.equal(together[token], packed(x[token]))


@needs_kernel
@pytest.mark.parametrize("amx", ENGINES)
def test_does_not_read_uninitialised_memory(amx: bool) -> None:
    """NaN left by others in the memory that the kernel borrows do not reach the result."""
    z, c, pivots = factors(33, 65, 31, pivots=True)
    packed = cpu.PackedFactors(z, c, pivots, amx=amx)
    x = torch.ones(13, 65, dtype=torch.bfloat16)
    for _ in range(20):
        poison = [
            torch.full((size,), torch.nan, dtype=torch.bfloat16) for size in range(1, 9000, 97)
        ]
        del poison
        assert packed(x).isfinite().all()


@needs_kernel
def test_compiles_as_one_operation() -> None:
    z, c, pivots = factors(48, 64, 24, pivots=True)
    packed = cpu.PackedFactors(z, c, pivots)
    bias = torch.ones(48, dtype=torch.bfloat16)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, bias), packed(x, bias))
    gated = cpu.PackedFactors(z, c, pivots, activation="silu")
    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), gated(x))


@needs_kernel
def test_wrong_inputs_are_refused() -> None:
    z, c, pivots = factors(48, 64, 24, pivots=True)
    packed = cpu.PackedFactors(z, c, pivots)
    with pytest.raises(RuntimeError, match="62 channels"):
        packed(torch.ones(3, 62, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="bfloat16 on CPU"):
        packed(torch.ones(3, 64))
    with pytest.raises(RuntimeError, match="bias"):
        packed(torch.ones(3, 64, dtype=torch.bfloat16), torch.ones(47, dtype=torch.bfloat16))
    gated = cpu.PackedFactors(z, c, pivots, activation="silu")
    with pytest.raises(RuntimeError, match="no bias"):
        gated(torch.ones(3, 64, dtype=torch.bfloat16), torch.ones(24, dtype=torch.bfloat16))


def test_wrong_factors_are_refused() -> None:
    z, c, pivots = factors(48, 64, 24, pivots=True)
    assert pivots is not None
    for wrong in (
        (z[:23], c, pivots),
        (z, c, pivots[:23]),
        (z.float(), c, pivots),
        (z, c, pivots.flip(0)),
        (z, c, pivots + 64),
    ):
        with pytest.raises(ValueError, match=r"expected|pivots must"):
            cpu.PackedFactors(*wrong)


def test_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = torch.cpu.get_capabilities() | {"avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: lacking)
    assert cpu.unsupported.__wrapped__() == "this processor has no avx512_bf16"
