"""Jobs that store int8: what they round, what the student sees, resume and training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models import save_model
from svdserve.compression.format.log import LOG_FILE, read_log
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.model.modules import imitate_server
from svdserve.compression.pipeline.calibration.tokens import calibration_tokens
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Refinement, Run, make_recipe
from svdserve.compression.pipeline.stages.refine import refine
from svdserve.compression.pipeline.workdir import WorkDirectory

RUN = Run(progress=False, threads=1)
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(6000))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2", tmp_path_factory.mktemp("dense"), dtype=torch.bfloat16)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def recipe_for(text: str, **fields: Any):
    given = {"tokens": 256, "seq_len": 32, "weights": "int8", "calibration": text}
    return make_recipe(**(given | fields))


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
@pytest.mark.parametrize("grouping", ["shared", "separate"])
def test_a_job_rounds_what_it_would_store(
    layout: str, grouping: str, dense: Path, text: str, tmp_path: Path
) -> None:
    """Truncated SVD does not see the student, so both jobs factor alike."""
    fields = {"method": "svd", "allocator": "uniform", "layout": layout, "grouping": grouping}
    for weights in ("float", "int8"):
        recipe = recipe_for(text, weights=weights, keep=0.6, dtype="float32", **fields)
        compress(str(dense), tmp_path / weights, recipe, RUN)
    exact, small = (open_checkpoint(tmp_path / weights) for weights in ("float", "int8"))
    check_finite(small)
    assert (exact.config.format_version, small.config.format_version) == (3, 3)
    assert exact.config.modules.keys() == small.config.modules.keys()
    assert exact.config.linears.keys() == small.config.linears.keys()
    for name, spec in small.config.modules.items():
        assert (spec.codec, exact.config.modules[name].codec) == ("int8", "float")
        want, got = exact.factors(name), small.factors(name)
        for suffix in ("factor_in", "factor_out"):
            scale = got.tensors[f"{suffix}_scale"]
            error = got.decoded(torch.float64)[suffix] - want.tensors[suffix].double()
            assert float((error.abs() / scale[:, None]).max()) < 0.501
        assert ("pivots" in got.tensors) == (layout == "interpolative")
    card = (tmp_path / "int8" / "README.md").read_text()
    assert "stored in int8 with one float32 scale" in card
    assert "int8" not in (tmp_path / "float" / "README.md").read_text()


def test_full_keep_is_the_model_in_int8(dense: Path, text: str, tmp_path: Path) -> None:
    compress(str(dense), tmp_path / "out", recipe_for(text, keep=1.0), RUN)
    checkpoint = open_checkpoint(tmp_path / "out")
    check_finite(checkpoint)
    assert checkpoint.config.modules == {}
    before, after = (load_file(path / SINGLE_FILE) for path in (dense, tmp_path / "out"))
    linears = {name.removesuffix(".weight") for name in before if name.endswith("_proj.weight")}
    assert set(checkpoint.config.encoded_linears) == linears
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in linears:
            assert torch.equal(after[name], tensor)
            continue
        peak = tensor.double().abs().amax(dim=1)
        torch.testing.assert_close(after[f"{name}_scale"].double(), peak / 127, rtol=1e-6, atol=0)
    assert after.keys() == before.keys() | {f"{linear}.weight_scale" for linear in linears}


def test_whole_weights_are_rounded_for_their_inputs(dense: Path, text: str, tmp_path: Path) -> None:
    recipe = recipe_for(text, keep=1.0)
    compress(str(dense), tmp_path / "out", recipe, RUN)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    found: list[torch.Tensor] = []
    linear = model.model.layers[0].self_attn.q_proj
    linear.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        model(calibration_tokens(dense, recipe))
    x, weight = found[0].double(), linear.weight.detach().double()
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = stored[f"{name}_scale"].double()[:, None]
    nearest, chosen = (weight / scale).round(), stored[name].double()
    assert (chosen - nearest).abs().max() > 0

    def error(levels: torch.Tensor) -> float:
        return float(((weight - levels * scale) @ x.T).norm())

    assert error(chosen) < 0.8 * error(nearest)


@pytest.mark.parametrize("keep", [0.9, 1.0])
def test_the_student_sees_what_is_served(keep: float, text: str, tmp_path: Path) -> None:
    """The walk's error behind the last block is that of the served model.

    That is the one which transformers loads, with activations rounded as the server rounds them.
    """
    model = save_model("llama", tmp_path / "model")
    recipe = recipe_for(text, tokens=64, keep=keep, precision="float32")
    compress(str(model), tmp_path / "out", recipe, RUN)
    assert open_checkpoint(tmp_path / "out").config.encoded_linears
    events = list(read_log(tmp_path / "out" / LOG_FILE))
    states = []
    for directory in (model, tmp_path / "out"):
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        loaded.model.norm = torch.nn.Identity()
        imitate_server(loaded)
        with torch.no_grad():
            states.append(loaded.model(calibration_tokens(model, recipe)).last_hidden_state)
    expected = float((states[0] - states[1]).norm() / states[0].norm())
    assert expected > 1e-3
    error = [event["error"] for event in events if event["event"] == "block"][-1]
    assert error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("trained", [False, True])
def test_killed_and_resumed_gives_the_same_bytes(
    trained: bool, dense: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"epochs": 1, "batch_size": 2, "precision": "float32", "learning_rate": 1e-3}
    recipe = recipe_for(text, keep=0.9, block_refinement=stage if trained else None)
    compress(str(dense), tmp_path / "whole", recipe, RUN)
    save = WorkDirectory.save_block

    def killed(self, index, tensors, specs):
        if index == 2:
            raise KeyboardInterrupt
        save(self, index, tensors, specs)

    monkeypatch.setattr(WorkDirectory, "save_block", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(str(dense), tmp_path / "cut", recipe, RUN)
    monkeypatch.undo()
    compress(str(dense), tmp_path / "cut", recipe, RUN.model_copy(update={"resume": True}))
    assert open_checkpoint(tmp_path / "cut").config.encoded_linears
    for name in (SINGLE_FILE, "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_refinement_is_judged_and_stored_rounded(text: str, tmp_path: Path) -> None:
    """Both held-out divergences are those of the int8 models that are on disk."""
    dense = save_model("qwen2", tmp_path / "dense", dtype=torch.bfloat16, initializer_range=0.3)
    recipe = recipe_for(text, method="svd", keep=0.5, tokens=64)
    compress(str(dense), tmp_path / "small", recipe, RUN)
    settings = Refinement(
        tokens=1024, seq_len=32, epochs=2, learning_rate=3e-3, evaluations=4, precision="float32"
    )
    report = refine(str(dense), tmp_path / "small", tmp_path / "out", settings, RUN)
    tokens = calibration_tokens(dense, make_recipe(calibration=text, tokens=1024, seq_len=32))
    held = tokens[settings.split(len(tokens))[1]]
    divergences = []
    for path in (tmp_path / "small", tmp_path / "out"):
        check_finite(open_checkpoint(path))
        with torch.no_grad():
            p, q = (
                AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(held)
                .logits.double()
                .log_softmax(-1)
                for model in (dense, path)
            )
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert [report.before, report.after] == pytest.approx(divergences, rel=1e-3)
    assert report.after < 0.8 * report.before
    before, after = (load_file(tmp_path / path / SINGLE_FILE) for path in ("small", "out"))
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".factor_" in name}
