"""Stored modules: what rounding keeps finite, and a layout that svdserve itself does not have.

``Scaled`` is U diag(s) V. Its matrices are not those that kernels multiply, so that whoever serves
it must decode it first, and everything that knows layouts by their interface only must work.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from checkpoints import write_checkpoint
from models import random_tokens, save_model
from svdserve.compression.format.codecs import FLOAT, INT8, Codec
from svdserve.compression.format.layouts import INTERPOLATIVE, LAYOUTS, PAIR, Factors, Layout
from svdserve.compression.format.layouts.base import Tensors
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.schema import ModuleSpec, linears_of
from svdserve.compression.format.stored import StoredFactors, store
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.model.modules import SharedFactors, replace_group
from svdserve.compression.system.errors import UserError
from svdserve.kernels import Part

MEMBERS, SIZES, IN, RANK = ("q_proj", "k_proj"), (10, 6), 12, 5
CODECS = pytest.mark.parametrize("codec", [FLOAT, INT8], ids=lambda codec: codec.name)
EVERY = pytest.mark.parametrize("layout", ["pair", "interpolative", "scaled"])


class Scaled(Layout):
    """U [m, r] and V [r, n] of unit columns and rows, and s as a matrix [1, r]."""

    name = "scaled"
    matrices = ("factor_in", "factor_out", "strength")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"factor_in": (r, n), "factor_out": (m, r), "strength": (1, r)}

    def encode(self, factors: Factors) -> dict[str, Tensor]:
        inner, outer = factors.factor_in.norm(dim=1), factors.factor_out.norm(dim=0)
        return {
            "factor_in": factors.factor_in / inner[:, None],
            "factor_out": factors.factor_out / outer,
            "strength": (inner * outer)[None],
        }

    def part(self, tensors: Tensors) -> Part:
        return Part(tensors["factor_in"], tensors["factor_out"] * tensors["strength"], None)


SCALED = Scaled()


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """As an installed package would add it."""
    LAYOUTS.add(SCALED.name, SCALED)
    yield
    del LAYOUTS._known[SCALED.name]


def pair(m: int = sum(SIZES), n: int = IN, r: int = RANK, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return Factors(torch.randn(r, n, **draw), torch.randn(m, r, **draw))


def close(codec: Codec, dtype: torch.dtype = torch.float32) -> float:
    """What storing may change of a weight, relative to its norm."""
    return 0.03 if codec is INT8 else 10 * torch.finfo(dtype).eps


@EVERY
@CODECS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_stored_is_the_weight(layout: str, codec: Codec, dtype: torch.dtype) -> None:
    factors = pair()
    found = store(factors, LAYOUTS[layout], codec, dtype)
    spec = spec_of(layout, codec)
    assert {name: tuple(t.shape) for name, t in found.tensors.items()} == spec.tensors()
    assert found.rank == RANK
    for name in found.layout.matrices:
        for suffix in codec.suffixes:
            kinds = (dtype,) if codec is FLOAT else codec.dtypes(suffix)
            assert found.tensors[f"{name}{suffix}"].dtype in kinds
    values = found.decoded(torch.float64)
    assert values.keys() == {*found.layout.matrices, *found.layout.indices}
    lost = (found.dense(torch.float64) - factors.dense()).norm() / factors.dense().norm()
    assert float(lost) < close(codec, dtype)
    assert torch.equal(found.dense(torch.float64), found.layout.dense(values))
    assert found.dense(torch.bfloat16).dtype == torch.bfloat16


def test_a_pair_is_balanced_where_one_of_its_matrices_is_too_large() -> None:
    factors = pair()
    uneven = Factors(factors.factor_in * 2.0**20, factors.factor_out * 2.0**-20)
    found = store(uneven, PAIR, FLOAT, torch.float16)
    lost = (found.dense(torch.float64) - factors.dense()).norm() / factors.dense().norm()
    assert float(lost) < close(FLOAT, torch.float16)
    balanced = PAIR.balanced(PAIR.encode(uneven))
    assert torch.equal(PAIR.dense(balanced), PAIR.dense(PAIR.encode(uneven)))  # rounds nothing
    norms = balanced["factor_out"].norm(dim=0) / balanced["factor_in"].norm(dim=1)
    assert bool((norms.log2().abs() <= 1).all())


@pytest.mark.parametrize("layout", [PAIR, INTERPOLATIVE, SCALED], ids=lambda layout: layout.name)
def test_numbers_beyond_the_dtype_are_refused(layout: Layout) -> None:
    large = Factors(pair().factor_in * 1e30, pair().factor_out * 1e30)
    with pytest.raises(
        FloatingPointError, match=r"exceed 6\.55e\+04, the largest value of float16"
    ):
        store(large, layout, FLOAT, torch.float16)


def spec_of(layout: str, codec: Codec) -> ModuleSpec:
    fields = {"role": "attention_in", "codec": codec.name, "members": MEMBERS, "layout": layout}
    return ModuleSpec.model_validate(fields | {"rank": RANK, "in": IN, "out": SIZES})


@EVERY
@CODECS
def test_modules_compute_with_it(layout: str, codec: Codec) -> None:
    parent = nn.Module()
    for member, size in zip(MEMBERS, SIZES, strict=True):
        setattr(parent, member, nn.Linear(IN, size, bias=False))
    stored, spec = store(pair(), LAYOUTS[layout], codec, torch.float32), spec_of(layout, codec)
    replace_group(parent, "qk_proj", spec, stored, torch.float32, "cpu")
    shared = parent.qk_proj
    assert isinstance(shared, SharedFactors)
    assert shared.state_dict().keys() == spec.tensors().keys()
    x = torch.randn(3, 4, IN)
    want = linear(x, stored.dense(torch.float32))
    got = torch.cat([getattr(parent, member)(x) for member in MEMBERS], dim=-1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    again = shared.factors()
    assert (again.layout.name, again.codec) == (layout, codec)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in stored.tensors.items())
    shared.thaw()
    assert shared.state_dict().keys() == {*stored.layout.matrices, *stored.layout.indices}
    got = torch.cat([getattr(parent, member)(x) for member in MEMBERS], dim=-1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def rewritten(directory: Path, codec: Codec) -> dict[str, StoredFactors]:
    """Store every module of a checkpoint of pairs anew, in the layout ``scaled``."""
    checkpoint, tensors = open_checkpoint(directory), load_file(directory / SINGLE_FILE)
    config = json.loads((directory / "config.json").read_text())
    found = {}
    for name, spec in checkpoint.config.modules.items():
        old = checkpoint.factors(name).decoded(torch.float64)
        given = Factors(old["factor_in"], old["factor_out"])
        found[name] = new = store(given, SCALED, codec, torch.float32)
        for suffix in spec.tensors():
            del tensors[f"{name}.{suffix}"]
        tensors |= {f"{name}.{suffix}": t.contiguous() for suffix, t in new.tensors.items()}
        module = config["quantization_config"]["modules"][name]
        module.update(layout="scaled", codec=codec.name)
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(params=[FLOAT, INT8], ids=lambda codec: codec.name)
def scaled(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, StoredFactors]]:
    dense = save_model("llama", tmp_path / "dense", num_hidden_layers=1)
    target = write_checkpoint(dense, tmp_path / "scaled", layout="pair", shared=True)
    return target, rewritten(target, request.param)


def test_readers_know_it(scaled: tuple[Path, dict[str, StoredFactors]]) -> None:
    directory, stored = scaled
    checkpoint = open_checkpoint(directory)
    check_finite(checkpoint)
    for name, factors in stored.items():
        found = checkpoint.factors(name)
        assert found.layout is SCALED
        assert torch.equal(found.dense(torch.float64), factors.dense(torch.float64))
    file_bytes = sum(tensor.nbytes for tensor in load_file(directory / SINGLE_FILE).values())
    assert sum(checkpoint.stored_bytes()[kind] for kind in ("lowrank", "dense")) == file_bytes
    tensors = load_file(directory / SINGLE_FILE)
    tensors[f"{name}.strength"] = tensors[f"{name}.strength"][:, 1:].contiguous()
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"module {name}: strength is "):
        open_checkpoint(directory)


def test_transformers_computes_with_it(scaled: tuple[Path, dict[str, StoredFactors]]) -> None:
    from transformers import AutoModelForCausalLM

    directory, stored = scaled
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(directory.with_name("dense"), dtype=torch.float32)
    config = open_checkpoint(directory).config
    with torch.no_grad():
        for name, factors in stored.items():
            spec = config.modules[name]
            rows = factors.dense(torch.float32).split(spec.out_features)
            for member, weight in zip(linears_of(name, spec), rows, strict=True):
                twin.get_submodule(member).weight.copy_(weight)
        tokens = random_tokens(1, 12)
        torch.testing.assert_close(model(tokens).logits, twin(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.vllm
@pytest.mark.parametrize("ranks", [1, 2])
def test_servers_decode_it(ranks: int, scaled: tuple[Path, dict[str, StoredFactors]]) -> None:
    """Every rank's share: its input channels and all rows, or all channels and its rows."""
    from svdserve.server.plugin.layer_parts import LayerPart
    from svdserve.server.plugin.shares import read_factors

    directory, stored = scaled
    checkpoint = open_checkpoint(directory)
    for name, spec in checkpoint.config.modules.items():
        part = LayerPart((name,), spec, spec.layout_and_codec()[1])
        whole = stored[name].dense(torch.float64)
        rows = [torch.arange(size) for size in spec.out_features]
        width = spec.in_features // ranks
        for rank in range(ranks):
            channels = range(rank * width, (rank + 1) * width)
            share = read_factors(checkpoint, part, rows, channels)
            assert (share.inner.codec, share.outer.codec) == (FLOAT, FLOAT)
            assert (len(share.inputs.slots), share.inputs.order) == (0, None)
            got = share.outer.tensors[""].double() @ share.inner.tensors[""].double()
            torch.testing.assert_close(
                got, whole[:, channels.start : channels.stop], rtol=1e-4, atol=1e-5
            )
        some = [torch.arange(size // 2) for size in spec.out_features]
        share = read_factors(checkpoint, part, some, range(spec.in_features))
        starts = [sum(spec.out_features[:i]) for i in range(len(spec.out_features))]
        mine = torch.cat([start + own for start, own in zip(starts, some, strict=True)])
        got = share.outer.tensors[""].double() @ share.inner.tensors[""].double()
        torch.testing.assert_close(got, whole[mine], rtol=1e-4, atol=1e-5)


def test_a_rank_for_it_is_found_by_search() -> None:
    """Its costs are r (m + n + 1)."""
    assert SCALED.parameters(100, 60, 7) == 7 * 161
    for keep in (0.1, 0.5, 0.8):
        assert SCALED.rank_for_keep(100, 60, keep) == math.floor(keep * 6000 / 161)


@pytest.mark.parametrize("layout", [PAIR, INTERPOLATIVE], ids=lambda layout: layout.name)
def test_int8_keeps_the_products_with_given_inputs(layout: Layout) -> None:
    """The second factor is fitted to the first as rounded; floats and other layouts stay as is."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 48, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(1, -1, 48) @ torch.randn(48, 48, generator=generator).double()
    gram = x.T @ x
    inner, outer = (torch.randn(*s, generator=generator).double() for s in ((20, 48), (60, 20)))
    factors = Factors(inner, outer)

    def error(stored: StoredFactors) -> float:
        change = stored.dense(torch.float64) - factors.dense()
        return float((change @ gram @ change.T).trace())

    plain = error(store(factors, layout, INT8, torch.float32))
    assert error(store(factors, layout, INT8, torch.float32, gram)) < 0.3 * plain
    for codec, other in ((FLOAT, layout), (INT8, SCALED)):
        one, two = (store(factors, other, codec, torch.float32, g) for g in (None, gram))
        assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("layout", [PAIR, INTERPOLATIVE], ids=lambda layout: layout.name)
@pytest.mark.parametrize("noise", [0, 1e-4, 1e-3])
def test_int8_of_a_latent_with_directions_that_hardly_occur(layout: Layout, noise: float) -> None:
    """A fit alone would give them coefficients beside which int8 rounds all others to zero."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = random(80, 20) @ random(20, 64) + noise * random(80, 64)
    left, values, right = torch.linalg.svd(weight)
    factors = Factors(values[:40, None] * right[:40], left[:, :40])
    gram = torch.eye(64, dtype=torch.float64)
    stored = store(factors, layout, INT8, torch.float32, gram)
    change = stored.dense(torch.float64) - weight
    assert float((change.norm() / weight.norm()) ** 2) < 2e-4


@pytest.mark.parametrize("layout", [PAIR, INTERPOLATIVE], ids=lambda layout: layout.name)
def test_int8_of_inputs_that_are_all_zero(layout: Layout) -> None:
    plain = store(pair(), layout, INT8, torch.float32)
    without = store(pair(), layout, INT8, torch.float32, torch.zeros(IN, IN, dtype=torch.float64))
    assert all(torch.equal(without.tensors[name], plain.tensors[name]) for name in plain.tensors)
