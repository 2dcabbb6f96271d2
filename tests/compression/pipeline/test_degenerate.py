"""Weights and inputs that are zero, constant, of low rank, tiny or huge, against float64."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import save_model
from svdserve.compression.allocation import ALLOCATORS, Budget, Module
from svdserve.compression.format.codecs import FLOAT, INT8
from svdserve.compression.format.layouts import INTERPOLATIVE, PAIR, Factors, get_layout
from svdserve.compression.format.log import LOG_FILE, read_log
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.stored import StoredFactors, store
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.methods import METHODS
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Run, make_recipe
from svdserve.compression.pipeline.stages import factoring
from svdserve.compression.statistics.linalg import relative_error
from svdserve.compression.statistics.moments import Statistics
from svdserve.compression.system.errors import UserError

QUIET = Run(progress=False)
T, FULL = 300, 99
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(m: int, n: int) -> dict[str, tuple[Tensor, int]]:
    """Each with its rank."""
    plain = draw(m, n, seed=1)
    dead = plain.clone()
    dead[1:5], dead[:, 2:6], dead[7] = 0, 0, dead[8]
    single = torch.zeros(m, n, dtype=torch.float64)
    single[3, 5] = 2
    return {
        "zero": (torch.zeros(m, n, dtype=torch.float64), 0),
        "constant": (torch.full((m, n), 0.3, dtype=torch.float64), 1),
        "rank one": (torch.outer(plain[:, 0], plain[0]), 1),
        "rank three": (plain[:, :3] @ draw(3, n, seed=2), 3),
        "one element": (single, 1),
        "dead channels": (dead, FULL),
        "tiny": (plain * 1e-30, FULL),
        "huge": (plain * 1e37, FULL),
    }


def inputs(n: int) -> dict[str, Tensor]:
    plain = draw(n, T, seed=3)
    dead = plain.clone()
    dead[3:9], dead[10] = 0, dead[11]
    return {
        "plain": plain,
        "zero": 0 * plain,
        "constant": torch.ones_like(plain),
        "rank two": plain[:, :2] @ draw(2, T, seed=4),
        "dead channels": dead,
        "large": plain * 1e15,
    }


def statistics_of(x: Tensor, x_f: Tensor, gradients: Tensor) -> Statistics:
    return Statistics(
        T,
        gram=x @ x.T / T,
        shift=(x_f - x) @ x.T / T,
        teacher_gram=x_f @ x_f.T / T,
        teacher_magnitude=x_f.abs().mean(dim=1),
        gradient_gram=gradients @ gradients.T / T,
        row_fisher=(gradients @ x_f.T).square().sum(dim=1) / T,
    )


def all_stored(factors: Factors, learned: bool) -> Iterator[StoredFactors]:
    """Learned methods scale their components anew before int8."""
    for layout in (PAIR, INTERPOLATIVE):
        yield StoredFactors(layout, FLOAT, layout.encode(factors))
        if not learned:
            yield store(factors, layout, INT8, torch.float32)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_every_method_on_every_degenerate_case(name: str, shape: tuple[int, int]):
    """Finite; no worse than zeros; a weight of rank k back where r >= k; int8 within its steps."""
    m, n = shape
    method = METHODS[name]
    curvatures = {"plain": draw(m, T, seed=5), "zero": torch.zeros(m, T).double()}
    for (case, (weight, own)), (seen, x), gradients in (
        (w, x, g)
        for w in weights(m, n).items()
        for x in inputs(n).items()
        for g in curvatures.values()
    ):
        statistics = statistics_of(x, x, gradients)
        for rank in (1, 5, min(m, n)):
            factors = method.solve(weight, statistics, rank, method.hyper_parameters).factors
            for found in all_stored(factors, method.learner is not None):
                where = (case, seen, rank, found.layout.name, found.codec.name)
                dense = found.dense(torch.float64)
                assert bool(dense.isfinite().all()), where
                assert 1 <= found.rank <= rank, where
                if own == 0:
                    assert not bool(dense.any()), where
                elif own <= rank or rank == min(m, n):
                    limit = 1e-6 if found.codec is FLOAT else 0.5
                    assert relative_error(weight, dense, None) < limit, where


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e37])
@pytest.mark.parametrize("layout", ["pair", "interpolative"])
def test_plain_svd_of_any_scale_is_eckart_young(scale: float, layout: str):
    weight = weights(16, 24)["dead channels"][0] * scale
    factors = METHODS["svd"].solve(weight, Statistics(0), 5, {}).factors
    dense = get_layout(layout).dense(get_layout(layout).encode(factors))
    best = torch.linalg.svdvals(weight / scale)[5:].norm() * scale
    assert float((weight - dense).norm()) == pytest.approx(float(best), rel=1e-9)


def test_saes_takes_its_beta_from_large_weights():
    """The squares of its quadratic's coefficients are beyond float64."""
    x = draw(24, T, seed=3) * 1e15
    statistics = statistics_of(x, x + 0.1 * draw(24, T, seed=6) * 1e15, draw(16, T, seed=5))
    method, weight = METHODS["saes-svd"], draw(16, 24, seed=1)
    plain, large = (
        method.solve(weight * scale, statistics, 5, method.hyper_parameters).facts["beta"]
        for scale in (1.0, 1e32)
    )
    assert large == pytest.approx(plain, rel=1e-6)


def test_the_error_of_zeros():
    zero, gram = torch.zeros(3, 4), torch.eye(4).double()
    for metric in (None, gram, 0 * gram):
        assert relative_error(zero, zero, metric) == 0
        assert relative_error(zero, zero + 1e-20, metric) == math.inf
        assert relative_error(zero + 1, zero, metric) == 1


@pytest.mark.parametrize("name", sorted(name for name in ALLOCATORS if name != "last-blocks"))
def test_a_module_of_zeros_takes_nothing_from_the_others(name: str):
    falling = torch.logspace(0, -2, 32, dtype=torch.float64)
    modules = {
        f"m{i}": Module(48, 32, i, False, s, 1.0, s, s)
        for i, s in enumerate([falling, 0 * falling, falling])
    }
    budget = Budget(0.6, INTERPOLATIVE)
    ranks = ALLOCATORS[name].function(modules, budget)
    budget.check(modules, ranks)
    assert ranks["m0"] == pytest.approx(ranks["m2"], abs=1)
    assert ranks["m0"] >= ranks["m1"]


# The whole job


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with projections of zeros in its middle and in its last block."""
    model = save_model("llama", tmp_path_factory.mktemp("zeros") / "model")
    tensors = load_file(model / SINGLE_FILE)
    for name in ("1.self_attn.o_proj", "1.mlp.down_proj", "2.mlp.down_proj"):
        tensors[f"model.layers.{name}.weight"].zero_()
    save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
    return model


def recipe_for(text: Path, **fields):
    return make_recipe(calibration=str(text), **{"tokens": 128, "seq_len": 32, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"grouping": "separate", "layout": "pair", "method": "kfac-svd", "allocator": "energy"},
        {"weights": "int8", "method": "res-svd", "allocator": "sensitivity"},
        {"method": "soco", "parameters": {"epochs": 1}},
        {"method": "acip", "parameters": {"epochs": 1}, "layout": "pair"},
    ],
    ids=["default", "separate", "int8", "soco", "acip"],
)
def test_a_model_with_zeros(fields: dict, zeros: Path, text: Path, tmp_path: Path):
    compress(str(zeros), tmp_path / "out", recipe_for(text, keep=0.6, **fields), QUIET)
    checkpoint = open_checkpoint(tmp_path / "out")
    check_finite(checkpoint)
    found = {
        name: checkpoint.factors(name).dense(torch.float64)
        for name in checkpoint.config.modules
        if name.endswith("2.mlp.down_proj")
    }
    assert all(not bool(dense.any()) for dense in found.values())
    events = list(read_log(tmp_path / "out" / LOG_FILE))
    errors = {e["module"]: e["error"] for e in events if e["event"] == "group"}
    assert errors["model.layers.2.mlp.down_proj"] == 0
    assert all(math.isfinite(error) for error in errors.values())


@pytest.mark.parametrize("method", ["soco", "acip", "svd"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_projection_far_from_one(method: str, scale: float, text: Path, tmp_path: Path):
    model = save_model("llama", tmp_path / "model")
    tensors = load_file(model / SINGLE_FILE)
    tensors["model.layers.1.self_attn.q_proj.weight"] *= scale  # scaled back by no norm
    tensors["model.layers.1.self_attn.k_proj.weight"] /= scale
    save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
    fields = {"method": method, "grouping": "separate", "keep": 0.6}
    fields |= {} if method == "svd" else {"parameters": {"epochs": 1}}
    fields |= {"allocator": "uniform"} if method == "svd" else {}
    compress(str(model), tmp_path / "out", recipe_for(text, **fields), QUIET)
    checkpoint = open_checkpoint(tmp_path / "out")
    check_finite(checkpoint)
    for letter in "qk":
        name = f"model.layers.1.self_attn.{letter}_proj"
        if name in checkpoint.config.modules:
            dense = checkpoint.factors(name).dense(torch.float64)
            assert relative_error(tensors[f"{name}.weight"], dense, None) < 1


def test_what_a_reader_would_refuse_is_never_published(
    zeros: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The fault is put in where factors are stored, behind the check of each module."""
    put = factoring.put_factors

    def broken(block, unit, factors, tensors):
        spec = put(block, unit, factors, tensors)
        if unit.name.endswith("2.mlp.down_proj"):
            tensors[f"{unit.name}.factor_in"][0, 0] = math.nan
        return spec

    monkeypatch.setattr(factoring, "put_factors", broken)
    out = tmp_path / "out"
    message = r"^internal fault, .*module model.layers.2.mlp.down_proj: factor_in is not finite.*$"
    with pytest.raises(UserError, match=message):
        compress(str(zeros), out, recipe_for(text, method="svd", allocator="uniform"), QUIET)
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()


def test_factors_beyond_the_stored_dtype_are_refused_at_their_module(text: Path, tmp_path: Path):
    model = save_model("llama", tmp_path / "model", dtype=torch.float16)
    tensors = load_file(model / SINGLE_FILE)
    largest = torch.finfo(torch.float16).max
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    up.copy_(largest * up.sign())
    save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
    recipe = recipe_for(text, method="svd", allocator="uniform", layout="interpolative")
    message = r"^model.layers.0.mlp.gate_up_proj: .*value of float16; give --dtype bfloat16 or .*$"
    with pytest.raises(UserError, match=message):
        compress(str(model), tmp_path / "out", recipe, QUIET)
    assert not list((tmp_path / "out.partial").glob("block-*"))
    # A pair of which only one factor would be too large is stored, and holds the same product.
    pair = recipe.model_copy(update={"layout": "pair"})
    compress(str(model), tmp_path / "pair", pair, QUIET)
    factors = open_checkpoint(tmp_path / "pair").factors("model.layers.0.mlp.gate_up_proj")
    gate = tensors["model.layers.0.mlp.gate_proj.weight"]
    weight = torch.cat([gate, up]).double()
    best = torch.linalg.svdvals(weight)[factors.rank :].norm()
    lost = (weight - factors.dense(torch.float64)).norm()
    assert float(lost) == pytest.approx(float(best), rel=1e-3)


def test_weights_beyond_the_stored_dtype_are_refused_before_the_start(text: Path, tmp_path: Path):
    model = save_model("llama", tmp_path / "model")
    tensors = load_file(model / SINGLE_FILE)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight: holds 1e\+06.* --dtype bfloat16"):
        compress(str(model), tmp_path / "out", recipe_for(text, dtype="float16"), QUIET)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("model.layers.1.mlp.up_proj.weight", "svd"),
        ("model.layers.1.mlp.up_proj.weight", "saes-svd"),
        ("model.layers.1.input_layernorm.weight", "saes-svd"),
        ("model.norm.weight", "kfac-svd"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(name: str, method: str, text: Path, tmp_path: Path):
    model = save_model("llama", tmp_path / "model")
    tensors = load_file(model / SINGLE_FILE)
    tensors[name].view(-1)[3] = math.inf
    save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
    fields = {"method": method, "allocator": "uniform"}
    with pytest.raises(UserError, match=rf"^{name}: holds inf or nan; the model is damaged"):
        compress(str(model), tmp_path / "out", recipe_for(text, **fields), QUIET)
