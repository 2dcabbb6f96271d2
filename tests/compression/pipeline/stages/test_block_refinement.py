"""Block refinement in the job: its errors against the models' own hidden states, and resume."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import save_model
from svdserve.compression.format.log import LOG_FILE
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.model.loading import load_model
from svdserve.compression.pipeline.calibration.tokens import calibration_tokens
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import (
    BlockRefinement,
    Recipe,
    Refinement,
    Run,
    make_recipe,
)
from svdserve.compression.pipeline.stages import block_refinement
from svdserve.compression.pipeline.stages.refine import refine
from svdserve.compression.system.errors import UserError

RUN = Run(progress=False, threads=1, batch_size=3)
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))
SETTINGS = BlockRefinement(
    epochs=4,
    learning_rate=1e-3,
    batch_size=4,
    precision="float32",
    held_out=0.2,
    patience=8,
)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A dense model, and the fields of a recipe without refinement."""
    root = tmp_path_factory.mktemp("block_refine")
    (root / "text.txt").write_text(TEXT)
    model = save_model("gemma3", root / "model", dtype=torch.bfloat16)
    fields = {"calibration": str(root / "text.txt"), "tokens": 1024, "seq_len": 32, "keep": 0.5}
    return model, fields


def refined_blocks(checkpoint: Path) -> list[dict]:
    events = [json.loads(line) for line in (checkpoint / LOG_FILE).read_text().splitlines()]
    return [event for event in events if event["event"] == "block_refinement"]


def outputs(model: Path, tokens: Tensor) -> list[Tensor]:
    """The output of every block in the model's own forward pass, float64."""
    network, seen = load_model(model, "float32"), []
    for block in network.model.layers:
        block.register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        network(tokens)
    return [output.double() for output in seen]


@pytest.mark.parametrize("method", ["saes-svd", "svd-llm", "svd"])
def test_errors_are_those_of_the_models(method: str, given: tuple[Path, dict], tmp_path: Path):
    """svd needs no stream and svd-llm the teacher's only: both run all the same."""
    model, fields = given
    exact = {"dtype": "float32", "precision": "float32"}
    recipe = make_recipe(method=method, block_refinement=SETTINGS, **exact, **fields)
    closed = recipe.model_copy(update={"block_refinement": None})
    compress(str(model), tmp_path / "closed", closed, RUN)
    compress(str(model), tmp_path / "refined", recipe, RUN)
    check_finite(open_checkpoint(tmp_path / "refined"))
    tokens = calibration_tokens(model, recipe)
    tokens = tokens[SETTINGS.split(len(tokens))[1]]
    teacher = outputs(model, tokens)
    student = outputs(tmp_path / "refined", tokens)
    after = [float((s - t).square().mean()) for s, t in zip(student, teacher, strict=True)]
    first = (outputs(tmp_path / "closed", tokens)[0] - teacher[0]).square().mean()
    logged = refined_blocks(tmp_path / "refined")
    assert [event["best"] for event in logged] == pytest.approx(after, rel=1e-3)
    assert logged[0]["before"] == pytest.approx(float(first), rel=1e-3)
    assert all(event["best"] < 0.99 * event["before"] for event in logged)


@pytest.mark.parametrize("killed_at", [10, 40])
def test_killed_and_resumed_gives_the_same_bytes(
    killed_at: int, given: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Streams and factors are stored rounded; a block has 28 steps."""
    model, fields = given
    recipe = make_recipe(block_refinement=SETTINGS, **fields)
    compress(str(model), tmp_path / "whole", recipe, RUN)
    steps: list[int] = []
    backward = block_refinement._BlockError.backward

    def killed(self, rows, step):
        steps.append(step)
        if len(steps) == killed_at:
            raise KeyboardInterrupt
        backward(self, rows, step)

    monkeypatch.setattr(block_refinement._BlockError, "backward", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(str(model), tmp_path / "cut", recipe, RUN)
    compress(str(model), tmp_path / "cut", recipe, RUN.model_copy(update={"resume": True}))
    names = (SINGLE_FILE, "config.json", "recipe.yaml")
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [event["index"] for event in refined_blocks(tmp_path / "cut")] == [0, 1, 2]
    assert make_recipe(**open_checkpoint(tmp_path / "cut").config.recipe) == recipe


def test_wild_training_leaves_the_closed_form(given: tuple[Path, dict], tmp_path: Path):
    model, fields = given
    fields = fields | {"keep": 0.99}
    wild = SETTINGS.model_copy(update={"learning_rate": 1e3, "patience": 2})
    for name, settings in (("closed", None), ("wild", wild)):
        recipe = make_recipe(method="svd", block_refinement=settings, **fields)
        compress(str(model), tmp_path / name, recipe, RUN)
    closed, same = (tmp_path / name / SINGLE_FILE for name in ("closed", "wild"))
    assert closed.read_bytes() == same.read_bytes()
    assert all(event["worse"] == wild.patience for event in refined_blocks(tmp_path / "wild"))


def test_full_keep_has_nothing_to_refine(given: tuple[Path, dict], tmp_path: Path):
    model, fields = given
    stages = {"block_refinement": SETTINGS, "refinement": {"epochs": 1}}
    report = compress(
        str(model), tmp_path / "out", make_recipe(**(fields | stages | {"keep": 1.0})), RUN
    )
    assert not refined_blocks(tmp_path / "out")
    assert report.refinement is None
    with pytest.raises(UserError, match="no factors to refine"):
        refine(str(model), tmp_path / "out", tmp_path / "again", Refinement(), RUN)


@pytest.mark.parametrize("stage", ["block_refinement", "refinement"])
def test_one_sequence_is_refused(stage: str, given: tuple[Path, dict], tmp_path: Path):
    model, fields = given
    recipe: Recipe = make_recipe(**(fields | {"tokens": 32, stage: {"epochs": 1}}))
    with pytest.raises(UserError, match="cannot be both trained on and held out"):
        compress(str(model), tmp_path / "out", recipe, RUN)
    assert not (tmp_path / "out.partial").exists()
