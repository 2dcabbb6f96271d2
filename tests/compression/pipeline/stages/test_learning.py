"""Learned scores: gradients, selection against brute force, and whole jobs on a pico model."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from models import save_model
from svdserve.compression.allocation.registry import Budget, Module, Ranks
from svdserve.compression.allocation.scores import scores
from svdserve.compression.format.codecs import FLOAT, Storage
from svdserve.compression.format.layouts import PAIR, Layout, get_layout
from svdserve.compression.format.log import LOG_FILE
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.schema import ModuleSpec
from svdserve.compression.format.stored import store
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.methods import get_method
from svdserve.compression.methods.learner import Learner
from svdserve.compression.methods.soco import Soco
from svdserve.compression.model.modules import FactoredWeight, replace_group
from svdserve.compression.pipeline.calibration.tokens import calibration_tokens
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Recipe, Run, make_recipe
from svdserve.compression.pipeline.stages.learning import Components, ScoreObjective
from svdserve.compression.pipeline.workdir import WorkDirectory
from svdserve.compression.statistics.moments import Statistics
from svdserve.compression.system.errors import UserError
from svdserve.compression.training.trainer import Trainer

RUN = Run(progress=False, threads=1)
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(6000))
MEMBERS = ("q_proj", "k_proj", "v_proj")


def grouped(weight: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    """A module with all components of ``weight`` [m, n] in the place of its linears."""
    m, n = weight.shape
    parent = nn.Module()
    for name, size in zip(MEMBERS, sizes, strict=False):
        setattr(parent, name, nn.Linear(n, size))
    names, rank = MEMBERS[: len(sizes)], min(m, n)
    module = "qkv_proj" if len(sizes) > 1 else names[0]
    spec = ModuleSpec(members=names, layout="pair", rank=rank, in_features=n, out_features=sizes)
    solution = get_method("acip").solve(weight, Statistics(0), rank, {})
    factors = store(solution.factors, PAIR, FLOAT, dtype)
    replace_group(parent, module, spec, factors, dtype, "cpu")
    return parent.to(dtype).requires_grad_(False)


def allocate(sizes: dict[str, tuple[int, int]], keep: float, layout: Layout):
    def ranks(learned: dict[str, Tensor]) -> Ranks:
        modules = {
            n: Module(*size, block=0, attention=True, scores=learned[f"{n}.scores"])
            for n, size in sizes.items()
        }
        return scores(modules, Budget(keep, layout))

    return ranks


@pytest.mark.parametrize("sizes", [(16,), (16, 8, 8)])
def test_gradient_of_scores_is_that_of_the_dense_formula(sizes: tuple[int, ...]):
    """∂/∂s of a loss of Σ s_i σ_i u_i v_iᵀ x + b, in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sum(sizes), 12, generator=generator, dtype=torch.float64)
    parent = grouped(weight, sizes, torch.float64)
    names = MEMBERS[: len(sizes)]
    x = torch.randn(3, 5, 12, generator=generator, dtype=torch.float64)
    target = torch.randn(3, 5, sum(sizes), generator=generator, dtype=torch.float64)
    (module,) = (m for m in parent.modules() if isinstance(m, FactoredWeight))
    given = torch.rand(12, generator=generator, dtype=torch.float64)
    found = []
    for dense in (False, True):
        free = given.clone().requires_grad_(True)
        bias = torch.cat([getattr(parent, name).bias for name in names])
        if dense:
            u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
            output = x @ ((u * sigma * free) @ v).T + bias
        else:
            module.component_scale = free
            output = torch.cat([getattr(parent, name)(x) for name in names], dim=-1)
        ((output - target) ** 4).mean().backward()
        found.append((output.detach(), free.grad))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


class OneDirection:
    """Objective: squared error of one linear where one output direction counts far more."""

    def __init__(self, parent: nn.Module, weight: Tensor, metric: Tensor) -> None:
        self.parent, self.weight, self.metric = parent, weight, metric
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(24, 64, weight.shape[1], generator=generator)

    def loss(self, rows: Tensor) -> Tensor:
        x = self.inputs[rows]
        wrong = self.parent.q_proj(x) - self.parent.q_proj.bias - x @ self.weight.T
        return (wrong @ self.metric).square().sum(-1).mean()

    def backward(self, rows: Tensor, step: int) -> None:  # noqa: ARG002
        self.loss(rows).backward()

    def evaluate(self, rows: Tensor) -> float:
        return float(self.loss(rows))


@pytest.mark.parametrize("name", ["soco", "acip"])
@pytest.mark.parametrize("layout", ["pair", "interpolative"])
def test_scores_find_the_components_that_brute_force_finds(name: str, layout: str):
    """The loss lives on small singular values, which truncation would drop."""
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(10, 8, generator=generator), full_matrices=False)
    weight = (u * torch.linspace(2, 0.5, 8)) @ v
    importance = torch.tensor([4.0, 0.1, 3.0, 0.1, 0.1, 0.1, 12.0, 8.0])
    parent = grouped(weight, (10,), torch.float32)
    base = OneDirection(parent, weight, u * importance)
    chosen_layout = get_layout(layout)
    keep = chosen_layout.parameters(10, 8, 4) / 80
    ranks = allocate({"q_proj": (10, 8)}, keep, chosen_layout)
    spectrum = Components(parent, keep, chosen_layout, ranks)
    learner = get_method(name).make_learner(
        make_recipe(
            method=name,
            parameters={"epochs": 30, "learning_rate": 0.1, "precision": "float32"},
        ).parameters
    )
    objective = ScoreObjective(spectrum, learner, base)
    stored = {"moves": Storage(FLOAT, torch.float32)}
    training = learner.training(0)
    trainer = Trainer({"moves": objective.moves}, stored, objective, training, 24)
    objective.steps = trainer.steps
    state = trainer.train()

    losses: dict[tuple[int, ...], float] = {}
    for chosen in combinations(range(8), 4):
        spectrum.scale(torch.zeros(8).index_fill(0, torch.tensor(chosen), 1.0))
        losses[chosen] = base.evaluate(trainer.held)
    best = min(losses, key=losses.__getitem__)
    assert best == (0, 2, 6, 7)
    selection = objective.selection(trainer.best()["moves"])
    assert tuple(selection.kept["q_proj"].tolist()) == best
    assert state.before == pytest.approx(losses[0, 1, 2, 3], rel=1e-4)  # uniform truncation
    assert state.best <= 1.05 * losses[best]


def test_the_stages_of_soco_only_rise():
    learner = Soco(exploration=0.3, refinement=0.4)
    stages = [learner.stage(i / 100) for i in range(101)]
    for name in ("ratio", "polarisation", "gate"):
        values = [getattr(stage, name) for stage in stages]
        assert values == sorted(values)
    widths = [stage.width for stage in stages]
    assert widths == sorted(widths, reverse=True)
    assert stages[0].ratio == 0
    assert {(s.ratio, s.polarisation, s.gate, s.width) for s in stages[30:71]} == {
        (learner.ratio_weight, 0, 0, 1)
    }
    assert stages[100].gate == pytest.approx(1)
    assert stages[100].polarisation == pytest.approx(learner.polarisation_weight)
    free = torch.tensor([0.0, 0.3, 0.7, 1.4])
    torch.testing.assert_close(learner.amplitudes(free, 0.5), free)
    torch.testing.assert_close(learner.amplitudes(free, 1.0), free * (free > 0.5))


@pytest.mark.parametrize("progress", [0.1, 0.35, 0.75, 1.0])
def test_the_penalty_of_soco_is_its_formula(progress: float):
    """Component by component in plain Python; its gradient against differences."""
    learner = Soco(ratio_weight=3.0, polarisation_weight=0.7, exploration=0.2, refinement=0.2)
    scores, price = [0.1, 0.47, 0.52, 0.9, 1.3], [0.2, 0.1, 0.3, 0.15, 0.25]
    keep = 0.6

    def by_hand(scores: list[float]) -> float:
        decided = max(0.0, (progress - 0.4) / 0.6)
        width = 0.1**decided
        stored = undecided = 0.0
        for score, cost in zip(scores, price, strict=True):
            stored += cost * min(1.0, max(0.0, (score - 0.5) / width + 0.5))
            undecided += cost * score * max(0.0, 1 - score) / sum(price)
        ratio = 0.05 * math.log1p(math.exp((stored - keep) / (1 - keep) / 0.05))
        return 3.0 * min(1.0, progress / 0.2) * ratio + 0.7 * decided * undecided

    free = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    found = learner.penalty(free, torch.tensor(price, dtype=torch.float64), keep, progress)
    assert found.item() == pytest.approx(by_hand(scores), rel=1e-9)
    found.backward()
    for index, slope in enumerate(free.grad.tolist()):
        sides = [
            by_hand([s + step * (i == index) for i, s in enumerate(scores)])
            for step in (-1e-6, 1e-6)
        ]
        assert slope == pytest.approx((sides[1] - sides[0]) / 2e-6, rel=1e-5, abs=1e-7)


def test_the_penalty_of_acip_stops_at_the_budget():
    learner = get_method("acip").make_learner({"l1_weight": 4.0})
    scores = torch.tensor([0.9, 0.6, 0.4], dtype=torch.float64, requires_grad=True)
    price = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    penalty = learner.penalty(scores, price, 0.7, 0.25)  # 0.8 is open
    penalty.backward()
    assert penalty.item() == pytest.approx(4.0 * 0.25 * (0.45 + 0.18 + 0.08) / 0.3)
    torch.testing.assert_close(scores.grad, 4.0 * 0.25 * price / 0.3)
    assert learner.penalty(scores, price, 0.9, 0.25).item() == 0


@pytest.mark.parametrize("learner", [Soco(), get_method("acip").make_learner({})])
def test_the_first_scores_are_uniform_truncation(learner: Learner):
    generator = torch.Generator().manual_seed(3)
    parent = nn.Module()
    parent.a = grouped(torch.randn(40, 24, generator=generator), (20, 10, 10), torch.float32)
    parent.b = grouped(9 * torch.randn(24, 32, generator=generator), (24,), torch.float32)
    sizes = {"a.qkv_proj": (40, 24), "b.q_proj": (24, 32)}
    for layout in map(get_layout, ("pair", "interpolative")):
        spectrum = Components(parent, 0.6, layout, allocate(sizes, 0.6, layout))
        selection = spectrum.select(learner.start(spectrum.strength), learner)
        for name, size in sizes.items():
            uniform = Budget(0.6, layout).rank(Module(*size, 0, True), 0.6)
            kept = selection.kept[name].tolist()
            assert kept == list(range(len(kept)))
            assert uniform <= len(kept) <= uniform + 1


@pytest.mark.parametrize("shape", [(10, 8), (8, 10)])
def test_sigma_is_in_the_columns(shape: tuple[int, int]):
    """Of W F with F Fᵀ the teacher's Gram matrix; inputs that never fire have none."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(shape[1], 50, generator=generator, dtype=torch.float64)
    inputs[:4] = 0
    gram = inputs @ inputs.T / 50
    factors = get_method("soco").solve(weight, Statistics(50, teacher_gram=gram), 8, {}).factors
    expected = torch.linalg.svdvals(weight @ inputs)[:8] / 50**0.5
    torch.testing.assert_close(factors.factor_out.norm(dim=0), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(factors.dense(), weight, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Text, and a dense model with weights large enough to predict something."""
    root = tmp_path_factory.mktemp("scores")
    text = root / "text.txt"
    text.write_text(TEXT)
    dense = save_model("qwen2", root / "dense", dtype=torch.bfloat16, initializer_range=0.3)
    return text, dense


def recipe_for(text: Path, method: str, **fields) -> Recipe:
    learns = {
        "soco": {"precision": "float32", "epochs": 3, "learning_rate": 0.2},
        "acip": {"precision": "float32", "epochs": 3},
    }.get(method, {})
    given = {"keep": 0.5, "tokens": 2048, "seq_len": 32, "parameters": learns, "method": method}
    return make_recipe(calibration=str(text), **(given | fields))


def divergence(dense: Path, small: Path, tokens: Tensor) -> float:
    """KL in nats per token, in float64 from the definition."""
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens)
            .logits.double()
            .log_softmax(-1)
            for path in (dense, small)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("method", "closed_form", "layout", "grouping"),
    [
        ("soco", "svd-llm", "interpolative", "shared"),
        ("soco", "svd-llm", "pair", "separate"),
        ("acip", "svd", "interpolative", "separate"),
        ("acip", "svd", "pair", "shared"),
    ],
)
def test_held_out_divergence_is_below_that_of_uniform_truncation(
    method: str,
    closed_form: str,
    layout: str,
    grouping: str,
    model: tuple[Path, Path],
    tmp_path: Path,
):
    text, dense = model
    found = {}
    for name in (method, closed_form):
        plan = {"allocator": "uniform"} if name == closed_form else {}
        recipe = recipe_for(text, name, layout=layout, grouping=grouping, **plan)
        report = compress(str(dense), tmp_path / name, recipe, RUN)
        if name == closed_form:
            assert report.stored_parameters <= 0.5 * report.dense_parameters
        tokens = calibration_tokens(dense, recipe)
        held = get_method(method).make_learner({}).training(recipe.seed).split(len(tokens))[1]
        found[name] = divergence(dense, tmp_path / name, tokens[held])
        check_finite(open_checkpoint(tmp_path / name))
    assert found[method] < 0.95 * found[closed_form]
    checkpoint = open_checkpoint(tmp_path / method)
    assert {spec.layout for spec in checkpoint.config.modules.values()} == {layout}
    assert make_recipe(**checkpoint.config.recipe) == recipe_for(
        text, method, layout=layout, grouping=grouping
    )
    lines = [json.loads(li) for li in (tmp_path / method / LOG_FILE).read_text().splitlines()]
    (logged,) = (line for line in lines if line["event"] == "scores")
    assert logged["best"] == pytest.approx(found[method], rel=0.02)  # bfloat16 factors
    units = [line for line in lines if line["event"] == "group"]
    assert all(0 <= line["error"] < 1 for line in units)
    assert not (tmp_path / f"{method}.partial").exists()


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
def test_the_budget_is_used_up_to_one_rank(layout: str, model: tuple[Path, Path], tmp_path: Path):
    """Over the whole model, dense modules included."""
    text, dense = model
    compress(str(dense), tmp_path / "out", recipe_for(text, "soco", layout=layout), RUN)
    modules = open_checkpoint(tmp_path / "out").config.modules.values()
    whole = 3 * (128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 256)
    factored = sum(spec.stacked * spec.in_features for spec in modules)
    stored = whole - factored
    stored += sum(get_layout(layout).parameters(s.stacked, s.in_features, s.rank) for s in modules)
    assert 0 <= 0.5 * whole - stored < max(spec.stacked + spec.in_features for spec in modules)


def test_killed_and_resumed_gives_the_same_bytes(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed among the components, while learning, and while the blocks are written."""
    text, dense = model
    recipe = recipe_for(text, "soco")
    compress(str(dense), tmp_path / "whole", recipe, RUN)
    out, resumed = tmp_path / "out", RUN.model_copy(update={"resume": True})
    steps: list[int] = []

    def kill(owner: type, name: str, call: int) -> None:
        original, calls = getattr(owner, name), []

        def killed(self, *args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt
            if name == "backward":
                steps.append(args[1])
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                compress(str(dense), out, recipe, resumed)
        assert not out.exists()

    kill(WorkDirectory, "save_block", 2)
    kill(ScoreObjective, "backward", 60)
    kill(WorkDirectory, "save_block", 3)
    assert steps == list(range(59))
    with pytest.raises(UserError, match=r"recipe\.keep was 0\.5"):
        compress(str(dense), out, recipe_for(text, "soco", keep=0.6), resumed)
    compress(str(dense), out, recipe, resumed)
    for name in (SINGLE_FILE, "config.json", "recipe.yaml"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_sequence_is_refused(model: tuple[Path, Path], tmp_path: Path):
    text, dense = model
    with pytest.raises(UserError, match="cannot be both trained on and held out"):
        compress(str(dense), tmp_path / "out", recipe_for(text, "soco", tokens=32), RUN)
