"""The factored modules against the multiplied-out dense weights."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from svdserve.compression.format.codecs import FLOAT, INT8
from svdserve.compression.format.layouts import Factors, get_layout
from svdserve.compression.format.schema import LinearSpec, ModuleSpec
from svdserve.compression.format.stored import store
from svdserve.compression.model.modules import (
    EncodedLinear,
    LowRankLinear,
    SharedFactors,
    SharedMember,
    imitate_server,
    replace_group,
    trainable_factors,
)
from svdserve.compression.system.errors import UserError
from svdserve.kernels import Int8Matrix, Int8Part, WholePart, reference

IN, SIZES, RANK = 24, (16, 8, 8), 6
MEMBERS = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Just the linears of an attention layer."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        for name, size in zip(MEMBERS, SIZES, strict=True):
            setattr(self, name, nn.Linear(IN, size, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in MEMBERS], -1)


def build(layout: str, bias: bool = True) -> tuple[Attention, Tensor, Tensor | None]:
    """A factored attention, its stacked dense weight and its stacked bias."""
    torch.manual_seed(0)
    attention = Attention(bias)
    pair = Factors(torch.randn(RANK, IN), torch.randn(sum(SIZES), RANK))
    factors = store(pair, get_layout(layout), FLOAT, torch.float32)
    spec = ModuleSpec(members=MEMBERS, layout=layout, rank=RANK, in_features=IN, out_features=SIZES)
    stacked = torch.cat([getattr(attention, m).bias for m in MEMBERS]) if bias else None
    replace_group(attention, "qkv_proj", spec, factors, torch.float32, "cpu")
    return attention, factors.dense(torch.float32), stacked


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
@pytest.mark.parametrize("bias", [True, False])
def test_shared_group_equals_dense(layout: str, bias: bool) -> None:
    attention, weight, stacked = build(layout, bias)
    x = torch.randn(2, 5, IN)
    torch.testing.assert_close(attention(x), linear(x, weight, stacked), atol=1e-4, rtol=1e-4)
    names = {"qkv_proj.factor_in", "qkv_proj.factor_out"}
    names |= {"qkv_proj.pivots"} if layout == "interpolative" else set()
    names |= {f"{m}.bias" for m in MEMBERS} if bias else set()
    assert set(attention.state_dict()) == names


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
def test_imitates_the_server(layout: str) -> None:
    """Thawed or not, int8 factors and weights give what int8 kernels are defined to give."""
    n, m, rank = 150, 40, 20
    generator = torch.Generator().manual_seed(0)
    pair = Factors(
        torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
    )
    factors = store(pair, get_layout(layout), INT8, torch.float32)
    shape = {"layout": layout, "codec": "int8", "rank": rank, "in_features": n}
    spec = ModuleSpec(members=("o_proj",), out_features=(m,), **shape)
    bias = nn.Parameter(torch.randn(m, generator=generator))
    module = LowRankLinear(spec, factors, bias, torch.float32, "cpu")
    whole = EncodedLinear(n, m, LinearSpec(codec="int8"), bias, torch.float32, "cpu")
    whole.load_state_dict({"bias": bias, "weight": torch.zeros(m, n).char(), "weight_scale": bias})
    whole.weight.data.random_(-127, 128, generator=generator)

    tensors = factors.tensors
    inner, outer = (
        Int8Matrix(tensors[name], tensors[f"{name}_scale"]) for name in ("factor_in", "factor_out")
    )
    part = Int8Part(inner, outer, tensors.get("pivots"))
    x = torch.randn(3, n, generator=generator, requires_grad=True)
    both = nn.ModuleList([module, whole])
    exact = module(x), whole(x)
    imitate_server(both)
    wanted = (
        reference.int8_linear(x, part, bias),
        reference.int8_linear(x, WholePart(Int8Matrix(whole.weight, whole.weight_scale)), bias),
    )
    for _ in range(2):
        for layer, want, unrounded in zip(both, wanted, exact, strict=True):
            found = layer(x)
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(found, unrounded, atol=1e-4, rtol=1e-3)
        trainable_factors(both)
    gradient, straight = (torch.autograd.grad(y.sum(), x)[0] for y in (module(x), exact[0]))
    torch.testing.assert_close(gradient, straight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
def test_single_linear_equals_dense(layout: str) -> None:
    parent = nn.Module()
    parent.o_proj = nn.Linear(IN, 16)
    bias = parent.o_proj.bias
    pair = Factors(torch.randn(RANK, IN), torch.randn(16, RANK))
    factors = store(pair, get_layout(layout), FLOAT, torch.float32)
    spec = ModuleSpec(
        members=("o_proj",), layout=layout, rank=RANK, in_features=IN, out_features=(16,)
    )
    replace_group(parent, "o_proj", spec, factors, torch.float32, "cpu")
    assert isinstance(parent.o_proj, LowRankLinear)
    assert parent.o_proj.bias is bias
    x = torch.randn(3, IN)
    expected = linear(x, factors.dense(torch.float32), bias)
    torch.testing.assert_close(parent.o_proj(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
def test_gradients_equal_dense(layout: str) -> None:
    attention, _, stacked = build(layout)
    x = torch.randn(4, IN, requires_grad=True)
    attention(x).square().sum().backward()
    shared = attention.qkv_proj
    weight_in = shared.factor_in.detach().requires_grad_()
    weight_out = shared.factor_out.detach().requires_grad_()
    reference_x = x.detach().requires_grad_()
    tensors = {"factor_in": weight_in, "factor_out": weight_out} | dict(shared.named_buffers())
    dense = get_layout(layout).dense(tensors)
    linear(reference_x, dense, stacked).square().sum().backward()
    for got, expected in (
        (x.grad, reference_x.grad),
        (shared.factor_in.grad, weight_in.grad),
        (shared.factor_out.grad, weight_out.grad),
    ):
        torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-4)


def test_projection_is_computed_once_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    from svdserve.compression.format.layouts import base

    attention, _, _ = build("pair")
    values: list[weakref.ref[Tensor]] = []
    original = base.project

    def counted(*arguments: Any) -> Tensor:
        value = original(*arguments)
        values.append(weakref.ref(value))
        return value

    monkeypatch.setattr(base, "project", counted)
    x = torch.randn(2, IN)
    with torch.no_grad():
        attention(x)
        assert len(values) == 1
        assert values[0]() is None  # although x is still alive
        attention(x)
        assert len(values) == 2
        attention.q_proj(x)
    assert values[2]() is not None
    del x
    gc.collect()
    assert values[2]() is None


def test_memo_is_never_stale() -> None:
    attention, weight, stacked = build("interpolative")
    assert stacked is not None
    head = slice(0, SIZES[0])
    x = torch.randn(3, IN)

    def check(name: str, rows: slice) -> None:
        expected = linear(x, weight[rows], stacked[rows])
        torch.testing.assert_close(getattr(attention, name)(x), expected, atol=1e-4, rtol=1e-4)

    check("q_proj", head)
    x.mul_(2)  # the same tensor with other values
    check("k_proj", slice(16, 24))
    with torch.inference_mode():
        check("v_proj", slice(24, 32))
    with torch.no_grad():
        attention.qkv_proj.factor_out.mul_(2)
        attention.qkv_proj.factor_in.mul_(1)
        weight *= 2
    check("q_proj", head)
    check("q_proj", head)


def test_members_allow_separate_backwards() -> None:
    attention, _, _ = build("pair")
    x = torch.randn(3, IN)
    attention.q_proj(x).sum().backward()
    attention.k_proj(x).sum().backward()
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad


def test_deepcopy_keeps_the_sharing_inside_the_copy() -> None:
    attention, weight, stacked = build("interpolative")
    x = torch.randn(3, IN)
    attention.q_proj(x)  # leaves a projection with a graph behind, which must not be copied
    twin = copy.deepcopy(attention)
    with torch.no_grad():
        attention.qkv_proj.factor_out.zero_()
    torch.testing.assert_close(twin(x), linear(x, weight, stacked), atol=1e-4, rtol=1e-4)
    assert isinstance(twin.q_proj, SharedMember)
    assert isinstance(twin.qkv_proj, SharedFactors)


def test_wrong_size_is_refused() -> None:
    attention = Attention(bias=False)
    spec = ModuleSpec(
        members=MEMBERS, layout="pair", rank=2, in_features=IN, out_features=(16, 8, 9)
    )
    with pytest.raises(UserError, match=r"v_proj \[9, 24\].*\[8, 24\]"):
        replace_group(attention, "qkv_proj", spec, None, torch.float32, "meta")
    assert isinstance(attention.q_proj, nn.Linear)


@pytest.mark.parametrize("members", [("q_proj", "k_proj"), ("q_proj",)])
def test_what_peft_prints_of_a_module_says_what_to_do(members: tuple[str, ...]) -> None:
    """PEFT ends with "Target module {module} is not supported", in which only the name is ours."""
    parent = nn.Module()
    for member in members:
        setattr(parent, member, nn.Linear(8, 6, bias=False))
    name = "q_proj" if len(members) == 1 else "qkv_proj"
    sizes = (6,) * len(members)
    spec = ModuleSpec(members=members, layout="pair", rank=3, in_features=8, out_features=sizes)
    replace_group(parent, name, spec, None, torch.float32, "cpu")
    for member in members:
        printed = str(getattr(parent, member))
        assert "takes no PEFT adapter: merge it into the dense model and compress that" in printed
        assert "\n" not in printed
