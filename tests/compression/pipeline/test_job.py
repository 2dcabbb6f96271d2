"""The whole compression job on pico models: result, resume, refusal, atomic output."""

import json
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kills import runs
from models import ARCHITECTURES, save_model
from svdserve.compression.format.log import LOG_FILE, read_log
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.schema import linears_of
from svdserve.compression.pipeline.calibration.tokens import calibration_tokens
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Run, make_recipe
from svdserve.compression.system.errors import UserError
from zygote import Started, Zygote, zygote

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))
QUIET = Run(progress=False, threads=1)


@pytest.fixture
def calibration(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def recipe_for(calibration: str, **fields):
    return make_recipe(calibration=calibration, **{"tokens": 256, "seq_len": 32, **fields})


def final_error(checkpoint: Path) -> float:
    """Of the hidden states behind the last block, as the log has it."""
    return [e["error"] for e in read_log(checkpoint / LOG_FILE) if e["event"] == "block"][-1]


# Every pair of two of the three choices.
COMBINATIONS = [
    (architecture, layout, ("shared", "separate")[(i + j) % 2])
    for i, architecture in enumerate(ARCHITECTURES)
    for j, layout in enumerate(("pair", "interpolative"))
]


@pytest.mark.parametrize(("architecture", "layout", "grouping"), COMBINATIONS)
def test_checkpoint_is_valid_and_within_the_budget(
    architecture: str, layout: str, grouping: str, tmp_path: Path, calibration: str
):
    model = save_model(architecture, tmp_path / "model", dtype=torch.bfloat16)
    fields = {"layout": layout, "grouping": grouping, "allocator": "uniform"}
    recipe = recipe_for(calibration, keep=0.6, **fields)
    report = compress(str(model), tmp_path / "out", recipe, QUIET)
    assert report.stored_parameters <= 0.6 * report.dense_parameters
    checkpoint = open_checkpoint(tmp_path / "out")
    check_finite(checkpoint)
    modules = checkpoint.config.modules
    assert len(modules) == 3 * (4 if grouping == "shared" else 7)
    assert {spec.layout for spec in modules.values()} == {layout}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{report.stored_parameters:,} parameters instead of {report.dense_parameters:,}" in card
    dense = load_file(model / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    factored = {f"{li}.weight" for name, spec in modules.items() for li in linears_of(name, spec)}
    for name, tensor in dense.items():
        assert (name in stored) != (name in factored)
        assert name in factored or torch.equal(stored[name], tensor)
    lines = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    errors = {line["module"]: line["error"] for line in lines if line["event"] == "group"}
    assert errors.keys() == modules.keys()
    assert all(0 < error < 1 for error in errors.values())
    assert not (tmp_path / "out.partial").exists()


def test_full_keep_leaves_the_model_as_it_is(tmp_path: Path, calibration: str):
    model = save_model("qwen2", tmp_path / "model")
    compress(str(model), tmp_path / "out", recipe_for(calibration, keep=1.0), QUIET)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config.modules == {}
    lines = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    assert not any(line["event"] == "gradients" for line in lines)
    dense = load_file(model / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert dense.keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in dense.items())


@pytest.mark.parametrize("method", ["svd", "svd-llm", "saes-svd", "saes-kfac", "fwsvd"])
def test_high_rank_model_computes_nearly_the_same(method: str, tmp_path: Path, calibration: str):
    """More rank, less difference of the logits, down to that of rounding."""
    model = save_model("llama", tmp_path / "model")
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.randint(4, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    differences = []
    with torch.no_grad():
        logits = dense(tokens).logits
        for keep in (0.3, 0.9, 0.9999):
            out = tmp_path / f"{keep}"
            compress(str(model), out, recipe_for(calibration, method=method, keep=keep), QUIET)
            small = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
            differences.append(float((small(tokens).logits - logits).norm() / logits.norm()))
    assert differences == sorted(differences, reverse=True)
    assert differences[-1] < 0.2 * differences[0]


@pytest.mark.parametrize("allocator", ["energy", "sensitivity", "divergence"])
@pytest.mark.parametrize("grouping", ["shared", "separate"])
def test_allocators_share_one_budget_over_the_model(
    allocator: str, grouping: str, tmp_path: Path, calibration: str
):
    model = save_model("qwen3", tmp_path / "model")
    recipe = recipe_for(
        calibration, keep=0.6, allocator=allocator, grouping=grouping, rank_multiple=2
    )
    report = compress(str(model), tmp_path / "out", recipe, QUIET)
    modules = open_checkpoint(tmp_path / "out").config.modules
    ranks = [spec.rank for spec in modules.values()]
    assert all(rank % 2 == 0 for rank in ranks)
    assert len({spec.rank for name, spec in modules.items() if "down_proj" in name}) > 1
    dense = 3 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
    assert report.dense_parameters == dense
    assert 0.6 * dense - 2 * 512 < report.stored_parameters <= 0.6 * dense


@pytest.mark.parametrize("method", ["saes-svd", "res-svd", "saes-kfac"])
def test_last_blocks_are_searched_by_the_error_at_the_final_block(
    method: str, tmp_path: Path, calibration: str
):
    model = save_model("llama", tmp_path / "model", num_hidden_layers=6)
    recipe = recipe_for(calibration, method=method, keep=0.8, allocator="last-blocks")
    report = compress(str(model), tmp_path / "out", recipe, QUIET)
    checkpoint = open_checkpoint(tmp_path / "out")
    errors = {}
    for folder in (tmp_path / "out.search").iterdir():
        tried = open_checkpoint(folder).config.modules
        assert {int(name.split(".")[2]) for name in tried} == set(range(6 - int(folder.name), 6))
        errors[int(folder.name)] = final_error(folder)
    assert set(errors) == {2, 3, 4, 5, 6}
    chosen = min(errors, key=errors.get)
    assert checkpoint.config.recipe["allocator_parameters"] == {"blocks": chosen}
    assert {int(name.split(".")[2]) for name in checkpoint.config.modules} == set(
        range(6 - chosen, 6)
    )
    assert report.stored_parameters <= 0.8 * report.dense_parameters


def test_a_search_of_another_recipe_is_not_taken_over(tmp_path: Path, calibration: str):
    model = save_model("llama", tmp_path / "model", num_hidden_layers=2)
    search = {"allocator": "last-blocks", "method": "res-svd"}
    compress(str(model), tmp_path / "out", recipe_for(calibration, **search), QUIET)
    other = recipe_for(calibration, seed=1, **search)
    run = QUIET.model_copy(update={"resume": True})
    with pytest.raises(UserError, match=r"out.search/\d: cannot resume, recipe.seed was 0"):
        compress(str(model), tmp_path / "out", other, run)
    compress(str(model), tmp_path / "out", other, QUIET.model_copy(update={"force": True}))
    uncalibrated = recipe_for(calibration, **search | {"method": "svd"})
    with pytest.raises(UserError, match="reads no calibration text, so blocks cannot"):
        compress(str(model), tmp_path / "svd", uncalibrated, QUIET)


def test_final_error_is_that_of_the_models(tmp_path: Path, calibration: str):
    model = save_model("llama", tmp_path / "model")
    recipe = recipe_for(calibration, tokens=64, precision="float32")
    compress(str(model), tmp_path / "out", recipe, QUIET)
    tokens = calibration_tokens(model, recipe)
    states = []
    for directory in (model, tmp_path / "out"):
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        loaded.model.norm = torch.nn.Identity()
        with torch.no_grad():
            states.append(loaded.model(tokens).last_hidden_state)
    expected = float((states[0] - states[1]).norm() / states[0].norm())
    assert final_error(tmp_path / "out") == pytest.approx(expected, rel=1e-3)


def test_reduced_products_change_little_and_leave_no_trace(tmp_path: Path, calibration: str):
    model = save_model("llama", tmp_path / "model")
    dense = []
    for precision in ("float32", "bfloat16"):
        recipe = recipe_for(calibration, precision=precision, allocator="uniform")
        compress(str(model), tmp_path / precision, recipe, QUIET)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / precision, dtype=torch.float32)
        dense.append(loaded.model.layers[0].mlp.down_proj.factors().dense(torch.float32))
        assert torch.get_float32_matmul_precision() == "highest"
    assert float((dense[0] - dense[1]).norm() / dense[0].norm()) < 0.1


def test_stored_dtype_follows_the_recipe(tmp_path: Path, calibration: str):
    model = save_model("llama", tmp_path / "model")
    compress(str(model), tmp_path / "out", recipe_for(calibration, dtype="float16"), QUIET)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {tensor.dtype for name, tensor in stored.items() if not name.endswith("pivots")}
    assert kinds == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


@pytest.fixture(scope="module")
def svdserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote(tmp_path_factory.mktemp("zygote")) as started:
        yield started


LONG = {"tokens": 2048, "seq_len": 64}  # of the jobs that are killed


def _start(svdserve: Zygote, model: Path, out: Path, text: str) -> Started:
    options = ["--calibration", text, "--tokens", "2048", "--seq-len", "64", "--threads", "1"]
    return svdserve.start(["compress", model, "--out", out, "--resume", *options])


def test_killed_jobs_resume_to_the_same_bytes(
    tmp_path: Path, calibration: str, svdserve: Zygote
) -> None:
    model = save_model("llama", tmp_path / "model", num_hidden_layers=8)
    whole = tmp_path / "whole"
    assert _start(svdserve, model, whole, calibration).wait().code == 0
    cut, kills, generator = tmp_path / "cut", 0, random.Random(0)
    partial = tmp_path / "cut.partial"
    while not cut.exists():
        # Every start gets one or two blocks further, and is killed somewhere in the next one.
        before = len(list(partial.glob("block-*.safetensors")))
        goal = before + generator.randint(1, 2)
        job = _start(svdserve, model, cut, calibration)
        while runs(job.pid) and len(list(partial.glob("block-*.safetensors"))) < goal:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        if runs(job.pid):
            job.kill(signal.SIGKILL)
        ended = job.wait()
        assert ended.code in (0, -signal.SIGKILL), ended.errors
        kills += ended.code != 0
        if cut.exists():  # an output directory is whole from the moment it exists
            open_checkpoint(cut)
    assert kills >= 3
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    events = [json.loads(line) for line in (cut / LOG_FILE).read_text().splitlines()]
    modules = [event["module"] for event in events if event["event"] == "group"]
    assert len(modules) == len(set(modules)) == 32


def _abandon(svdserve: Zygote, model: Path, out: Path, text: str) -> None:
    """Leave unfinished work behind."""
    job = _start(svdserve, model, out, text)
    partial = out.with_name(out.name + ".partial")
    while not (partial / "block-00000.safetensors").exists():
        assert runs(job.pid)
        time.sleep(0.005)
    job.kill(signal.SIGKILL)
    job.wait()


def test_changed_recipe_is_not_resumed(tmp_path: Path, calibration: str, svdserve: Zygote) -> None:
    model, out = save_model("llama", tmp_path / "model"), tmp_path / "out"
    _abandon(svdserve, model, out, calibration)
    run = Run(progress=False, threads=1, resume=True)
    fields = {"calibration": calibration, **LONG}
    with pytest.raises(UserError, match=r"recipe.keep was 0.8 and is 0.7"):
        compress(str(model), out, make_recipe(**fields, keep=0.7), run)
    with pytest.raises(UserError, match="add --resume to go on or --force to start over"):
        compress(str(model), out, make_recipe(**fields), QUIET)
    compress(str(model), out, make_recipe(**fields), run)
    open_checkpoint(out)


def test_resuming_what_is_complete_changes_nothing(tmp_path: Path, calibration: str):
    model, out = save_model("llama", tmp_path / "model"), tmp_path / "out"
    first = compress(str(model), out, recipe_for(calibration), QUIET)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run = QUIET.model_copy(update={"resume": True, "batch_size": 2})  # other sums, same job
    second = compress(str(model), out, recipe_for(calibration), run)
    assert second == replace(first, made=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(UserError, match=r"out: cannot resume, recipe.keep was 0.8 and is 0.7"):
        compress(str(model), out, recipe_for(calibration, keep=0.7), run)
    weights = load_file(model / "model.safetensors")
    tuned = {name: tensor * 1.001 for name, tensor in weights.items()}  # same shapes and sizes
    save_file(tuned, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"out: cannot resume, weights.model was"):
        compress(str(model), out, recipe_for(calibration), run)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    Path(calibration).write_text(TEXT[::-1])
    with pytest.raises(UserError, match=r"out: cannot resume, texts\..*text.txt was"):
        compress(str(model), out, recipe_for(calibration), run)
    Path(calibration).write_text(TEXT)
    assert not compress(str(model), out, recipe_for(calibration), run).made
    (out / LOG_FILE).write_text('{"event": "published", "job": 1}\n')
    with pytest.raises(UserError, match="nothing to resume, and its log does not name"):
        compress(str(model), out, recipe_for(calibration), run)


def test_existing_output_is_kept_without_force(tmp_path: Path, calibration: str):
    model, out = save_model("llama", tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty.*--force"):
        compress(str(model), out, recipe_for(calibration), QUIET)
    assert (out / "precious.txt").read_text() == "mine"
    compress(str(model), out, recipe_for(calibration), QUIET.model_copy(update={"force": True}))
    open_checkpoint(out)
    assert not (out / "precious.txt").exists()


def test_a_compressed_model_is_not_compressed_again(tmp_path: Path, calibration: str):
    model, out = save_model("llama", tmp_path / "model"), tmp_path / "out"
    compress(str(model), out, recipe_for(calibration), QUIET)
    with pytest.raises(UserError, match=r"already quantised or compressed \(svdserve\)"):
        compress(str(out), tmp_path / "again", recipe_for(calibration), QUIET)


def test_one_token_of_calibration_is_enough_to_finish(tmp_path: Path, calibration: str):
    model = save_model("llama", tmp_path / "model", dtype=torch.float16)
    compress(str(model), tmp_path / "out", recipe_for(calibration, tokens=1), QUIET)
    check_finite(open_checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("method", ["saes-svd", "saes-kfac", "svd"])
def test_a_damaged_weight_is_named(method: str, tmp_path: Path, calibration: str):
    from safetensors.torch import save_file

    model = save_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_for(calibration, method=method, allocator="uniform")  # sweeps no gradients
    message = r"^model.layers.1.mlp.up_proj.weight: holds inf or nan; the model is damaged"
    with pytest.raises(UserError, match=message):
        compress(str(model), tmp_path / "out", recipe, QUIET)
