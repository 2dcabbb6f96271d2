"""Refinement on a pico model: it learns, resumes to the same bytes, and never makes worse."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models import save_model
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.pipeline.calibration.tokens import calibration_tokens
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Refinement, Run, load_recipe, make_recipe
from svdserve.compression.pipeline.stages.refine import check_own_calibration, refine
from svdserve.compression.statistics.moments import Statistics
from svdserve.compression.system.errors import UserError
from svdserve.compression.training.distillation import Distillation

RUN = Run(progress=False, threads=1)
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(6000))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Text, the dense model and a compressed one; weights large enough to predict something."""
    root = tmp_path_factory.mktemp("refine")
    text = root / "text.txt"
    text.write_text(TEXT)
    dense = save_model("qwen2", root / "dense", dtype=torch.bfloat16, initializer_range=0.3)
    recipe = make_recipe(method="svd", keep=0.5, calibration=str(text), tokens=64, seq_len=32)
    compress(str(dense), root / "small", recipe, RUN)
    assert "refinement: null" in (root / "small" / "recipe.yaml").read_text()
    return text, dense, root / "small"


def settings(text: Path, **changes) -> Refinement:
    given = {"tokens": 2048, "seq_len": 32, "epochs": 2, "learning_rate": 3e-3, "evaluations": 4}
    return Refinement(calibration=str(text), precision="float32", **(given | changes))


def divergence(dense: Path, small: Path, tokens: torch.Tensor) -> float:
    """KL in nats per token, in float64 from the definition."""
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens)
            .logits.double()
            .log_softmax(-1)
            for path in (dense, small)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_held_out_divergence_falls(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    text, dense, small = models
    given = settings(text)
    report = refine(str(dense), small, tmp_path / "out", given, RUN)
    recipe = make_recipe(calibration=str(text), tokens=2048, seq_len=32)
    tokens = calibration_tokens(dense, recipe)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    held = tokens[order[: round(len(tokens) * given.held_out)]]
    assert report.before == pytest.approx(divergence(dense, small, held), rel=1e-3)
    assert report.after == pytest.approx(divergence(dense, tmp_path / "out", held), rel=1e-3)
    assert report.after < 0.7 * report.before
    checkpoint = open_checkpoint(tmp_path / "out")
    check_finite(checkpoint)
    recipe = make_recipe(**checkpoint.config.recipe)
    assert recipe.refinement == given
    assert make_recipe(**load_recipe(tmp_path / "out" / "recipe.yaml")) == recipe
    assert "refinement:" in (tmp_path / "out" / "README.md").read_text()
    before, after = (load_file(path / SINGLE_FILE) for path in (small, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".factor_" in name}


def test_killed_and_resumed_gives_the_same_bytes(
    models: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, dense, small = models
    given = settings(text)
    refine(str(dense), small, tmp_path / "whole", given, RUN)
    calls = []

    def killed(self, rows, step):
        calls.append(step)
        if len(calls) == 45:
            raise KeyboardInterrupt
        backward(self, rows, step)

    backward = Distillation.backward
    monkeypatch.setattr(Distillation, "backward", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        refine(str(dense), small, out, given, RUN)
    assert not out.exists()
    with pytest.raises(UserError, match="add --resume"):
        refine(str(dense), small, out, given, RUN)
    resumed = RUN.model_copy(update={"resume": True})
    with pytest.raises(UserError, match="epochs was 2"):
        refine(str(dense), small, out, settings(text, epochs=3), resumed)
    refine(str(dense), small, out, given, resumed)
    assert calls[45:] == list(range(calls[45], 58))  # 58 steps
    assert calls[45] >= 28  # the finished part was not trained again
    again = refine(str(dense), small, out, given, resumed)
    assert (again.made, again.steps) == (False, 58)
    whole, parts = (path / SINGLE_FILE for path in (tmp_path / "whole", out))
    assert whole.read_bytes() == parts.read_bytes()


def test_only_files_of_a_checkpoint_are_copied(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    text, dense, small = models
    given = tmp_path / "given"
    shutil.copytree(small, given)
    for name in ("pytorch_model.bin", "modeling_mine.py", "NOTICE"):
        (given / name).write_text("x")
    refine(str(dense), given, tmp_path / "out", settings(text, epochs=1), RUN)
    names = {path.name for path in given.iterdir()} - {"pytorch_model.bin", "modeling_mine.py"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_never_returns_something_worse(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """What is given is near the dense model, and every step leads far away from it."""
    text, dense, _ = models
    recipe = make_recipe(method="svd", keep=0.99, calibration=str(text), tokens=64, seq_len=32)
    compress(str(dense), tmp_path / "near", recipe, RUN)
    wild = settings(text, learning_rate=30.0)
    report = refine(str(dense), tmp_path / "near", tmp_path / "out", wild, RUN)
    assert report.after == report.before < 0.1
    before, after = (load_file(tmp_path / path / SINGLE_FILE) for path in ("near", "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_sequence_is_refused(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    text, dense, small = models
    with pytest.raises(UserError, match="cannot be both"):
        refine(str(dense), small, tmp_path / "out", settings(text, tokens=32), RUN)


def test_calibration_is_that_of_the_checkpoint(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """64 tokens of its recipe: one sequence to train on, one held out."""
    _, dense, small = models
    given = Refinement(epochs=3, precision="float32", batch_size=1, patience=3)
    report = refine(str(dense), small, tmp_path / "out", given, RUN)
    assert report.steps == 3
    recipe = make_recipe(**open_checkpoint(tmp_path / "out").config.recipe)
    assert given.text(recipe) == recipe
    tokens = calibration_tokens(dense, recipe)
    (held,) = given.split(2)[1].tolist()
    assert report.before == pytest.approx(divergence(dense, small, tokens[[held]]), rel=1e-3)


@pytest.mark.parametrize("named", [None, "same", "self+same"])
def test_a_checkpoint_does_not_choose_what_is_read(
    named: str | None, models: tuple[Path, Path, Path]
) -> None:
    """Its recipe may name any file of the machine; the user has to name it again."""
    text, _, small = models
    with pytest.raises(UserError, match=f"name it yourself: give --calibration {text}"):
        check_own_calibration(small, Refinement(calibration=named))
    for given in (str(text), "self"):
        check_own_calibration(small, Refinement(calibration=given))


def test_a_checkpoint_of_own_samples_needs_no_calibration(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, dense, _ = models
    recipe = make_recipe(method="svd", keep=0.5, tokens=64, seq_len=32)
    compress(str(dense), tmp_path / "own", recipe, RUN)
    check_own_calibration(tmp_path / "own", Refinement())


@pytest.mark.parametrize(
    ("target", "method"), [(Statistics, "__init__"), (Distillation, "backward")]
)
def test_compress_refines_as_refine_does(
    target: type,
    method: str,
    models: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in either stage, it ends in the bytes of the two commands one after the other."""
    text, dense, _ = models
    fields = {"method": "svd", "calibration": str(text), "tokens": 1024, "seq_len": 32, "keep": 0.5}
    given = settings(text).model_copy(update=dict.fromkeys(("calibration", "tokens", "seq_len")))
    compress(str(dense), tmp_path / "closed", make_recipe(**fields), RUN)
    expected = refine(str(dense), tmp_path / "closed", tmp_path / "expected", given, RUN)
    recipe, out = make_recipe(**fields, refinement=given), tmp_path / "out"
    original, calls = getattr(target, method), []

    def killed(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(target, method, killed)
    with pytest.raises(KeyboardInterrupt):
        compress(str(dense), out, recipe, RUN)
    assert not out.exists()
    report = compress(str(dense), out, recipe, RUN.model_copy(update={"resume": True}))
    for name in (SINGLE_FILE, "recipe.yaml", "README.md"):
        assert (out / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert open_checkpoint(out).config.recipe == recipe.model_dump(mode="json")
    assert report.refinement is not None
    assert report.refinement.after == expected.after < expected.before
    assert {path.name for path in tmp_path.iterdir()} == {"closed", "expected", "out"}


def test_refinement_may_have_its_own_calibration(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """The closed form sees one sequence, the refinement 64 other ones."""
    text, dense, _ = models
    fields = {"calibration": "self", "tokens": 32, "seq_len": 32, "keep": 0.5}
    recipe = make_recipe(**fields, method="svd-llm", refinement=settings(text))
    report = compress(str(dense), tmp_path / "out", recipe, RUN)
    assert report.tokens == 32
    assert report.refinement is not None
    assert report.refinement.steps == 58
    assert report.refinement.after < report.refinement.before
    missing = fields | {"calibration": "no/such/file", "refinement": settings(text)}
    with pytest.raises(UserError, match="no/such/file: no such file"):
        compress(str(dense), tmp_path / "none", make_recipe(**missing), RUN)
