"""Int8 weights: rounding, the format, transformers, the walk, resume and training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from models import random_tokens, save_model
from svdserve.compression.evaluation.inspection import inspect_checkpoint
from svdserve.compression.format.codecs.int8 import dequantized, quantized
from svdserve.compression.format.layouts import LAYOUTS, Layout
from svdserve.compression.format.log import LOG_FILE, read_log
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.schema import parse_config
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.pipeline.calibration.tokens import calibration_tokens
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Refinement, Run, make_recipe
from svdserve.compression.pipeline.refine import refine
from svdserve.compression.pipeline.workdir import WorkDirectory
from svdserve.compression.system.errors import UserError

RUN = Run(progress=False, threads=1)
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(6000))
MODULE = "model.layers.1.self_attn.q_proj"
LINEAR = "model.layers.1.self_attn.o_proj"


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_by_the_definition(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    values, scale = quantized(weight)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    for row, levels, unit in zip(weight.tolist(), values.tolist(), scale.tolist(), strict=True):
        peak = max(map(abs, row))
        assert unit == pytest.approx(peak / 127, rel=1e-7) if peak else unit > 0
        assert max(map(abs, levels)) == (127 if peak else 0)
        for value, level in zip(row, levels, strict=True):
            assert abs(value - level * unit) <= 0.5000001 * unit
    error = dequantized(values, scale, torch.float64) - weight.double()
    assert float((error.abs() / scale[:, None]).max()) <= 0.5000001
    assert quantized(weight[:, :0])[0].shape == (5, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_equals_the_multiplied_out_model(
    layout: Layout, shared: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Computed in float32: the rounded weights are what is compared, not products in bfloat16."""
    small, reference = tmp_path / "small", tmp_path / "reference"
    write_checkpoint(
        save_model("qwen2", tmp_path / "dense"),
        small,
        layout=layout,
        shared=shared,
        keep_dense=frozenset({"o_proj", "v_proj"}),
        reference=reference,
        int8=True,
    )
    tokens = random_tokens(2, 20)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=dtype)
    assert model.get_submodule(LINEAR).weight.dtype == torch.int8
    assert model.get_submodule(LINEAR).weight_scale.dtype == torch.float32
    twin = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype)
    with torch.no_grad():
        ours, theirs = (m(tokens).logits.double() for m in (model, twin))
    assert float((ours - theirs).norm() / theirs.norm()) < (
        1e-5 if dtype == torch.float32 else 0.03
    )
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / SINGLE_FILE) for path in (small, tmp_path / "again"))
    if dtype == torch.float32:
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layout", LAYOUTS)
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
    assert (exact.config.format_version, small.config.format_version) == (1, 2)
    assert exact.config.modules.keys() == small.config.modules.keys()
    for name in small.config.modules:
        want, got = exact.factors(name), small.factors(name)
        for suffix in ("factor_in", "factor_out"):
            scale = getattr(got, f"{suffix}_scale")
            error = getattr(got.to(torch.float64), suffix) - getattr(want, suffix).double()
            assert float((error.abs() / scale[:, None]).max()) < 0.501
        assert (got.pivots is None) == (layout == "pair")
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
    assert set(checkpoint.config.int8_linears) == linears
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in linears:
            assert torch.equal(after[name], tensor)
            continue
        peak = tensor.double().abs().amax(dim=1)
        torch.testing.assert_close(after[f"{name}_scale"].double(), peak / 127, rtol=1e-6, atol=0)
        want = (tensor.double() / after[f"{name}_scale"].double()[:, None]).round()
        assert torch.equal(after[name].double(), want)
    assert after.keys() == before.keys() | {f"{linear}.weight_scale" for linear in linears}


def test_bytes_are_those_of_the_files(dense: Path, tmp_path: Path) -> None:
    small = write_checkpoint(
        dense,
        tmp_path / "small",
        layout="interpolative",
        shared=False,
        keep_dense=frozenset({"o_proj"}),
        int8=True,
    )
    tensors = load_file(small / SINGLE_FILE)
    whole = load_file(dense / SINGLE_FILE)
    factors = [t for n, t in tensors.items() if ".factor_" in n or n.endswith("pivots")]
    stored = open_checkpoint(small).stored_bytes()
    assert stored["lowrank"] == sum(tensor.nbytes for tensor in factors)
    assert stored["lowrank"] + stored["dense"] == sum(t.nbytes for t in tensors.values())
    assert stored["dense_equivalent"] == sum(tensor.nbytes for tensor in whole.values())
    rows = {row.module: row for row in inspect_checkpoint(small).modules}
    for name in (MODULE, LINEAR):
        assert rows[name].dtype == "int8"
        mine = {n: t for n, t in tensors.items() if n.startswith(f"{name}.") and "bias" not in n}
        assert rows[name].nbytes == sum(tensor.nbytes for tensor in mine.values())
        assert rows[name].dense_nbytes == whole[f"{name}.weight"].nbytes


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (f"{MODULE}.factor_in_scale", None, f"module {MODULE}: tensor .*scale is missing"),
        (f"{MODULE}.factor_in_scale", lambda t: t[1:], "factor_in_scale is .* expected"),
        (f"{MODULE}.factor_out_scale", lambda t: t.half(), "factor_out_scale is torch.float16, al"),
        (f"{MODULE}.factor_out", lambda t: t.float(), r"factor_out is torch.float32, .*int8"),
        (f"{LINEAR}.weight_scale", None, f"int8 linear {LINEAR}: tensor .*weight_scale is missing"),
        (f"{LINEAR}.weight", lambda t: t.float(), f"int8 linear {LINEAR}: .* is torch.float32, al"),
        (f"{LINEAR}.weight_scale", lambda t: t[1:], f"{LINEAR}: weight is .* and its scale"),
        (f"{MODULE}.factor_in_scale", lambda t: t * 0, f"{MODULE}: factor_in_scale must be pos"),
        (f"{LINEAR}.weight_scale", lambda t: -t, f"{LINEAR}: weight_scale must be positive"),
        (f"{LINEAR}.weight_scale", lambda t: t / 0, f"{LINEAR}: weight_scale is not finite"),
    ],
)
def test_broken_tensors_are_named(
    tensor: str, change: Any, message: str, dense: Path, tmp_path: Path
) -> None:
    small = write_checkpoint(
        dense,
        tmp_path / "small",
        layout="pair",
        shared=False,
        keep_dense=frozenset({"o_proj"}),
        int8=True,
    )
    check_finite(open_checkpoint(small))
    tensors = load_file(small / SINGLE_FILE)
    if change is None:
        del tensors[tensor]
    else:
        tensors[tensor] = change(tensors[tensor]).contiguous()
    save_file(tensors, small / SINGLE_FILE)
    with pytest.raises(UserError, match=message):
        check_finite(open_checkpoint(small))


def test_broken_configurations(dense: Path, tmp_path: Path) -> None:
    small = write_checkpoint(
        dense,
        tmp_path / "small",
        layout="pair",
        shared=False,
        keep_dense=frozenset({"o_proj"}),
        int8=True,
    )
    linears = json.loads((small / "config.json").read_text())["quantization_config"]["int8_linears"]
    edit(small, int8_linears=[*linears, MODULE])
    with pytest.raises(UserError, match=f"int8_linears: {MODULE} belongs to {MODULE}"):
        open_checkpoint(small)
    edit(small, int8_linears=[*linears, linears[0]])
    with pytest.raises(UserError, match="belongs to int8_linears"):
        open_checkpoint(small)
    edit(small, int8_linears=linears[1:])
    with pytest.raises(UserError, match=f"{linears[0]}.weight_scale belongs to no module"):
        open_checkpoint(small)
    edit(small, int8_linears=linears, format_version=1)
    with pytest.raises(UserError, match="int8 weights need format_version 2"):
        open_checkpoint(small)
    edit(small, int8_linears=[*linears, "model.side_proj"], format_version=2)
    with pytest.raises(UserError, match=r"int8 linear model.side_proj: tensor .* is missing"):
        open_checkpoint(small)


def test_old_blocks_are_written_as_they_were(dense: Path, tmp_path: Path) -> None:
    small = write_checkpoint(dense, tmp_path / "small", layout="pair", shared=True)
    block = json.loads((small / "config.json").read_text())["quantization_config"]
    assert block["format_version"] == 1
    assert "int8_linears" not in block
    assert all("weights" not in module for module in block["modules"].values())
    assert parse_config(block).dump() == block


@pytest.mark.parametrize("keep", [0.9, 1.0])
def test_the_student_sees_the_rounded_weights(keep: float, text: str, tmp_path: Path) -> None:
    """The walk's error behind the last block is that of the model which transformers loads."""
    model = save_model("llama", tmp_path / "model")
    recipe = recipe_for(text, tokens=64, keep=keep, precision="float32")
    compress(str(model), tmp_path / "out", recipe, RUN)
    assert open_checkpoint(tmp_path / "out").config.int8_linears
    events = list(read_log(tmp_path / "out" / LOG_FILE))
    states = []
    for directory in (model, tmp_path / "out"):
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        loaded.model.norm = torch.nn.Identity()
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
    assert open_checkpoint(tmp_path / "cut").config.int8_linears
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
