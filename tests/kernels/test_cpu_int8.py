"""The fused CPU kernel with int8 weights, and with weights that are not factored."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_kernel import ENGINES, SHAPES, assert_close, needs_kernel
from svdserve.kernels import Activation, Int8Matrix, Int8Part, WholePart, cpu, prepare, reference
from svdserve.kernels.parts import Part
from svdserve.kernels.registry import NoImplementation

pytestmark = needs_kernel

TOKENS = [1, 2, 3, 4, 5, 6, 7, 32, 800]
# Around whole groups of 64 columns; the last has so many columns that panels are cut into blocks.
WIDE = [*SHAPES, (64, 257, 130), (640, 1500, 701), (70, 3400, 40)]
KINDS = ["interpolative", "pair", "whole"]


def generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(n * 31**i for i, n in enumerate(numbers)))


def int8(rows: int, columns: int, seed: torch.Generator) -> Int8Matrix:
    values = torch.randint(-127, 128, (rows, columns), generator=seed, dtype=torch.int8)
    scale = torch.rand(rows, generator=seed) + 0.5
    return Int8Matrix(values, scale / (64 * max(columns, 1) ** 0.5))


def part_of(kind: str, m: int, n: int, r: int) -> Int8Part | WholePart:
    seed = generator(m, n, r)
    if kind == "whole":
        return WholePart(int8(m, n, seed))
    if kind == "pair":
        return Int8Part(int8(r, n, seed), int8(m, r, seed))
    pivots = torch.randperm(n, generator=seed)[:r].sort().values
    return Int8Part(int8(r, n - r, seed), int8(m, r, seed), pivots)


def packed(
    part: Int8Part | WholePart, activation: Activation | None = None, amx: bool | None = None
) -> cpu.PackedFactors:
    weights = (None, part.weight) if isinstance(part, WholePart) else part
    return cpu.PackedFactors(*weights, activation=activation, amx=amx)


def inputs(tokens: int, n: int) -> Tensor:
    """A few columns are much larger than the others, as in language models."""
    seed = generator(tokens, n)
    x = torch.randn(tokens, n, generator=seed)
    return (x * (1 + 40 * (torch.rand(n, generator=seed) > 0.98))).bfloat16()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("amx", ENGINES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "r"), WIDE)
def test_equals_the_definition(m: int, n: int, r: int, kind: str, tokens: int, amx: bool) -> None:
    """In float64. A sum in float32 may round to the next integer, which shifts a whole output."""
    part, x = part_of(kind, m, n, r), inputs(tokens, n)
    bias = torch.randn(m, generator=generator(m)).bfloat16()
    kernel = packed(part, amx=amx)
    want = reference.int8_linear(x.double(), part)
    limit = 2**-7 if kind == "whole" else 2**-5
    assert relative_error(kernel(x), want) < limit
    assert relative_error(kernel(x, bias), want + bias.double()) < limit


@pytest.mark.parametrize("amx", ENGINES)
@pytest.mark.parametrize("tokens", [1, 13, 32, 800])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (17, 33), (64, 64), (70, 257), (96, 1030)])
def test_integers_are_exact(m: int, n: int, tokens: int, amx: bool) -> None:
    """Whole numbers with 127 in every group need no rounding; the largest sums do not overflow."""
    seed = generator(m, n, tokens)
    x = torch.randint(-127, 128, (tokens, n), generator=seed).bfloat16()
    x[:, :: reference.GROUP] = 127
    x[0], values = 127, torch.randint(-127, 128, (m, n), generator=seed, dtype=torch.int8)
    values[0] = -127
    part = WholePart(Int8Matrix(values, torch.ones(m)))
    want = x.double() @ values.double().T
    got = packed(part, amx=amx)(x)
    # float32 adds the groups' exact sums, in which every whole number below 2^24 is exact.
    assert want.abs().max() < 2**24
    assert torch.equal(got, want.float().bfloat16())


def test_a_large_column_costs_its_own_group_only() -> None:
    """One scale for a token would round the columns of all other groups to almost nothing."""
    part = part_of("whole", 64, 1024, 0)
    x = torch.randn(16, 1024, generator=generator(1)).bfloat16()
    x[:, 5] = 500
    assert isinstance(part, WholePart)
    assert isinstance(part.weight, Int8Matrix)
    weight = part.weight.values.double() * part.weight.scale.double()[:, None]
    exact = x.double() @ weight.T
    scale = x.double().abs().amax(dim=1, keepdim=True) / 127
    per_token = ((x.double() / scale).round() * scale) @ weight.T
    assert (packed(part)(x).double() - exact).norm() < 0.6 * (per_token - exact).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_values_without_a_finite_scale(kind: str) -> None:
    part = part_of(kind, 40, 300, 20)
    kernel = packed(part)
    x = inputs(3, 300)
    x[0], x[1] = 0, 1e-38
    got = kernel(x)
    assert (got[:2].float().abs() < 1e-35).all()
    assert relative_error(got[2], reference.int8_linear(x[2].double(), part)) < 2**-5


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(kind: str) -> None:
    x = inputs(14, 300)
    kernel = packed(part_of(kind, 40, 300, 20))
    clean = kernel(x)
    x[3, 7] = torch.nan
    got = kernel(x)
    assert got[3].isnan().all()
    others = [row for row in range(14) if row != 3]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("amx", ENGINES)
@pytest.mark.parametrize("tokens", [1, 13, 800])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "r"), [(2, 3, 1), (30, 33, 15), (1280, 576, 301)])
def test_activations(
    m: int, n: int, r: int, kind: str, activation: Activation, tokens: int, amx: bool
) -> None:
    part, x = part_of(kind, m, n, r), inputs(tokens, n) / 8
    want = reference.gated(reference.int8_linear(x.double(), part), activation)
    got = packed(part, activation, amx)(x)
    assert relative_error(got, want) < 2**-5
    assert packed(part, activation, amx)(x[:0]).shape == (0, m // 2)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_leading_dimensions(kind: str) -> None:
    part = part_of(kind, 48, 100, 20)
    kernel = packed(part)
    wide = torch.randn(6, 2, 250, generator=generator(0)).bfloat16()
    for x in (wide[:, :, 50:150], wide[..., :200:2], wide[:, 0, :100], wide[0, 0, :100]):
        assert kernel(x).shape == (*x.shape[:-1], 48)
        assert torch.equal(kernel(x), kernel(x.contiguous()))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("m", "n", "r"), WIDE)
def test_whole_weights_in_bfloat16(m: int, n: int, r: int, tokens: int) -> None:
    del r
    seed = generator(m, n)
    weight = (torch.randn(m, n, generator=seed) / n**0.5).bfloat16()
    bias, x = torch.randn(m, generator=seed).bfloat16(), inputs(tokens, n)
    kernel = cpu.PackedFactors(None, weight)
    want = x.float() @ weight.float().T
    assert_close(kernel(x), want)
    assert_close(kernel(x, bias), want + bias.float())
    assert kernel.stored_bytes == weight.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_sorts_pivots_and_is_one_operation(kind: str) -> None:
    part, x = part_of(kind, 64, 300, 40), inputs(5, 300)
    shuffled = part
    if isinstance(part, Int8Part) and part.pivots is not None:
        order = torch.randperm(40, generator=generator(2))
        (rows, row_scale), (columns, scale) = part.factor_in, part.factor_out
        inner = Int8Matrix(rows[order], row_scale[order])
        shuffled = Int8Part(inner, Int8Matrix(columns[:, order], scale), part.pivots[order])
    kernel = prepare([shuffled], implementation="cpu")
    assert torch.equal(kernel(x), packed(part)(x))
    compiled = torch.compile(kernel, fullgraph=True)
    assert torch.equal(compiled(x), kernel(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Int8Part(m, m), "expected \\[r, n\\] and \\[m, r\\]"),
        (
            lambda m: WholePart(Int8Matrix(m.values, m.scale[1:])),
            "scales of the weight are \\[3\\]",
        ),
        (lambda m: WholePart(Int8Matrix(m.values, m.scale.double())), "expected int8 and float32"),
        (lambda m: WholePart(m.values), "the weight is torch.int8"),
        (
            lambda m: Int8Part(m, Int8Matrix(m.values[:, :4], m.scale), torch.ones(4)),
            "expected int32",
        ),
    ],
)
def test_wrong_weights_are_refused(
    make: Callable[[Int8Matrix], Int8Part | WholePart], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare([make(int8(4, 6, generator(1)))])


def test_only_the_cpu_kernel_multiplies_int8() -> None:
    part = part_of("pair", 32, 64, 16)
    with pytest.raises(NoImplementation, match="torch multiplies factors in floating point only"):
        prepare([part], implementation="torch")
    whole = WholePart(torch.ones(4, 4, dtype=torch.bfloat16))
    mixed = [Part(torch.ones(2, 4).bfloat16(), torch.ones(4, 2).bfloat16()), whole]
    with pytest.raises(ValueError, match="all be factored, or none"):
        prepare(mixed)
