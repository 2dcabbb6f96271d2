"""Refinement on a pico model: it learns, resumes to the same bytes, and never makes worse."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models import save_model
from svdserve.compression import refine as module
from svdserve.compression.calibration import calibration_tokens
from svdserve.compression.checkpoint import SINGLE_FILE, check_finite, open_checkpoint
from svdserve.compression.errors import UserError
from svdserve.compression.job import compress
from svdserve.compression.recipe import Run, make_recipe
from svdserve.compression.refine import Refinement, refine

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
    assert checkpoint.config.recipe["refinement"]["epochs"] == 2
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

    def killed(self, batch):
        calls.append(batch)
        if len(calls) == 45:
            raise KeyboardInterrupt
        return loss(self, batch)

    loss = module._Trainer._loss
    monkeypatch.setattr(module._Trainer, "_loss", killed)
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
    assert len(calls) < 45 + 60  # the finished part was not trained again
    whole, parts = (path / SINGLE_FILE for path in (tmp_path / "whole", out))
    assert whole.read_bytes() == parts.read_bytes()


def test_never_returns_something_worse(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    text, dense, small = models
    wild = settings(text, learning_rate=30.0)
    report = refine(str(dense), small, tmp_path / "out", wild, RUN)
    assert report.after == report.before
    before, after = (load_file(path / SINGLE_FILE) for path in (small, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_sequence_is_refused(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    text, dense, small = models
    with pytest.raises(UserError, match="cannot be both"):
        refine(str(dense), small, tmp_path / "out", settings(text, tokens=32), RUN)
