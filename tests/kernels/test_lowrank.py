"""The public operation: every implementation that runs here, against the definition in float64."""

import pytest
import torch
from torch import Tensor

from lowrank_cases import TOLERANCE, Shape, assert_equals_definition, inputs
from svdserve.kernels import (
    Activation,
    NoImplementation,
    Part,
    cpu,
    lowrank_linear,
    prepare,
    reference,
)
from svdserve.kernels.registry import (
    IMPLEMENTATIONS,
    OVERRIDE,
    Request,
    choose,
    reasons_against,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    Shape(1, 2, 1),
    Shape(17, 33, 15),
    Shape(40, 40, 40),
    Shape(17, 33, 15, pivots=False),
    Shape(64, 48, 48, pivots=False),
]
HERE = [
    pytest.param(i.name, dtype, id=f"{i.name}-{str(dtype).removeprefix('torch.')}")
    for i in IMPLEMENTATIONS
    for dtype in DTYPES
    if i.reason_against(Request("cpu", dtype, (32, 32), prepared=True)) is None
]


@pytest.mark.parametrize(("name", "dtype"), HERE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 19])
def test_prepared_equals_the_definition(
    name: str, dtype: torch.dtype, shape: Shape, rows: int
) -> None:
    part = shape.part(dtype)
    module = prepare([part], implementation=name)
    x, bias = inputs(rows, shape.channels, dtype), inputs(1, shape.outputs, dtype)[0]
    for added in (None, bias):
        assert_equals_definition(module(x, added), x, [part], added)
    assert module.stored_bytes == part.factor_in.nbytes + part.factor_out.nbytes


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_call_equals_the_definition(dtype: torch.dtype, shape: Shape) -> None:
    part = shape.part(dtype)
    x, bias = inputs(6, shape.channels, dtype), inputs(1, shape.outputs, dtype)[0]
    wide = torch.stack([x, x + 1], dim=-1).reshape(2, 3, -1)[..., ::2]  # every second of a row
    assert not wide.is_contiguous()
    got = lowrank_linear(wide, *part, bias)
    assert got.shape == (2, 3, shape.outputs)
    assert got.is_contiguous()
    if dtype != torch.float64:
        assert_equals_definition(got.reshape(6, -1), x, [part], bias)
    assert lowrank_linear(x[:0], *part).shape == (0, shape.outputs)
    assert lowrank_linear(x[0], *part).shape == (shape.outputs,)


def test_several_parts_of_unequal_ranks_stand_side_by_side() -> None:
    shapes = [Shape(24, 40, 9), Shape(8, 40, 3), Shape(8, 40, 40, pivots=False)]
    parts = [shape.part(torch.float32, seed) for seed, shape in enumerate(shapes)]
    x, bias = inputs(5, 40, torch.float32), inputs(1, 40, torch.float32)[0]
    assert_equals_definition(prepare(parts)(x, bias), x, parts, bias)


@pytest.mark.parametrize("shape", [Shape(17, 33, 15), Shape(17, 33, 15, False)], ids=str)
def test_gradients_are_those_of_the_definition(shape: Shape) -> None:
    def gradients(function: object) -> list[Tensor]:
        inner, outer, pivots = shape.part(torch.float64)
        x, bias = inputs(4, 33, torch.float64), inputs(1, 17, torch.float64)[0]
        leaves = [tensor.requires_grad_() for tensor in (x, inner, outer, bias)]
        y = function(x, inner, outer, pivots, bias)  # type: ignore[operator]
        return list(torch.autograd.grad(y.square().sum(), leaves))

    for got, want in zip(
        gradients(lowrank_linear), gradients(reference.lowrank_linear), strict=True
    ):
        torch.testing.assert_close(got, want)
    inner, outer, pivots = shape.part(torch.float64)
    x = inputs(2, 33, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lowrank_linear(x, inner, outer, pivots), (x,))


def test_autocast_casts_the_products() -> None:
    part = Shape(16, 32, 8).part(torch.float32)
    x = inputs(4, 32, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert lowrank_linear(x, *part).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [Shape(16, 32, 8), Shape(16, 32, 8, False)], ids=str)
def test_is_one_operation_for_the_compiler(shape: Shape) -> None:
    part = shape.part(torch.float32)
    x, bias = inputs(4, 32, torch.float32), inputs(1, 16, torch.float32)[0]
    torch.library.opcheck(torch.ops.svdserve.lowrank_linear, (x, *part, bias, None))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lowrank_linear, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(x, *part, bias), lowrank_linear(x, *part, bias))
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.svdserve.lowrank_linear in [getattr(c, "overloadpacket", c) for c in calls]


def test_wrong_arguments_are_named() -> None:
    inner, outer, pivots = Shape(16, 32, 8).part(torch.float32)
    x = inputs(4, 32, torch.float32)
    wrong: list[tuple[tuple[Tensor | None, ...], str]] = [
        ((x[:, :31], inner, outer, pivots), r"x is \[4, 31\]; the factors expect \[..., 32\]"),
        ((x.half(), inner, outer, pivots), "x is torch.float16"),
        ((x, inner[:7], outer, pivots), r"\[\[7, 24\], \[16, 8\], \[8\]\]; expected"),
        ((x, inner, outer[:, :0], pivots), "r at least 1"),
        ((x, inner.half(), outer, pivots), "one floating point dtype"),
        ((x, inner, outer, pivots.float()), "pivots are torch.float32"),
        ((x, inner.to("meta"), outer, pivots), "expected one"),
        ((x, inner, outer, pivots, x[0]), r"bias is \[32\]; expected \[16\]"),
        ((x, inner, outer, pivots, x[0, :16].half()), "bias is torch.float16"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            lowrank_linear(*arguments)
    for repeated in (pivots.new_zeros(8), pivots + 32):
        with pytest.raises(ValueError, match=r"distinct within 0 \.\. 31"):
            prepare([Part(inner, outer, repeated)])
    with pytest.raises(ValueError, match="the same x"):
        prepare([Part(inner, outer, pivots), Shape(16, 31, 8).part(torch.float32)])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_are_for_kernels_that_fuse_them(activation: Activation) -> None:
    shape = Shape(24, 32, 8)
    parts, x = [shape.part(torch.bfloat16)], inputs(5, 32, torch.bfloat16)
    with pytest.raises(ValueError, match="an activation of 23 outputs"):
        prepare([Shape(23, 32, 8).part(torch.float32)], activation=activation)
    for name in ("torch", "triton"):
        request = Request("cuda", torch.bfloat16, (24, 8), prepared=True, activation=activation)
        assert "leaves activations to the caller" in reasons_against(request)[name]
    if cpu.unsupported() is None:
        got = prepare(parts, activation=activation)(x)
        want = lowrank_linear(x.double(), *(f.double() for f in parts[0][:2]), parts[0].pivots)
        want = reference.gated(want, activation)
        atol = TOLERANCE[torch.bfloat16] * float(want.abs().max())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


def test_the_override_and_the_error_that_lists_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    request = Request("cpu", torch.float32, (24, 8), prepared=True)
    assert choose(request).name == "torch"
    monkeypatch.setenv(OVERRIDE, "triton")
    with pytest.raises(NoImplementation, match=r"triton needs a GPU.*torch can") as caught:
        prepare([Shape(16, 32, 8).part(torch.float32)])
    assert "cpu is for bfloat16" in str(caught.value)
    assert choose(request, "torch").name == "torch"
    with pytest.raises(NoImplementation, match="'cuda-graphs'"):
        choose(request, "cuda-graphs")


def test_triton_can_compute_where_rows_are_aligned() -> None:
    pytest.importorskip("triton")
    (triton,) = (i for i in IMPLEMENTATIONS if i.name == "triton")
    for dtype in DTYPES:
        for columns, prepared in (
            ((1830, 2266), True), ((1824, 2272), False), ((96, 32, 64, 64), True)
        ):  # fmt: skip
            assert triton.reason_against(Request("cuda", dtype, columns, prepared)) is None
        unaligned = Request("cuda", dtype, (1830, 2266), prepared=False)
        assert "multiples of 16" in str(triton.reason_against(unaligned))
    wide = Request("cuda", torch.float64, (96, 32), prepared=True)
    assert "is for bfloat16" in str(triton.reason_against(wide))
