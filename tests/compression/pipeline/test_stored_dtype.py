"""In which dtype linears are stored, what the bytes are compared with, and the exact error."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import random_tokens, save_model
from svdserve.compression.evaluation.inspection import inspect_checkpoint
from svdserve.compression.format.log import LOG_FILE, read_log
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.format.schema import linears_of
from svdserve.compression.format.stored import StoredFactors
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.pipeline import job
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Run, make_recipe
from svdserve.compression.system.errors import UserError
from svdserve.kernels import Int8Matrix, Int8Part, reference
from svdserve.server.metrics import model_facts

QUIET = Run(progress=False)
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))


def recast(directory: Path, dtypes: dict[str, torch.dtype], rest: torch.dtype, named: str) -> Path:
    """A model whose tensors have the dtype of the first part of a name that is in ``dtypes``."""
    save_model("llama", directory)
    tensors = {
        name: tensor.to(next((d for part, d in dtypes.items() if part in name), rest))
        for name, tensor in load_file(directory / SINGLE_FILE).items()
    }
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | {"dtype": named or None}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def small_recipe(**fields):
    plain = {"method": "svd", "allocator": "uniform", "keep": 0.8}
    return make_recipe(**plain | fields)


def check_against_dense(model: Path, out: Path) -> None:
    """Bytes of the report, the card, inspect and the metrics are those of the real dense file."""
    dense = {name: tensor.nbytes for name, tensor in load_file(model / SINGLE_FILE).items()}
    inspection = inspect_checkpoint(out)
    assert inspection.dense_equivalent_nbytes == sum(dense.values())
    assert model_facts(out).dense_equivalent_bytes == sum(dense.values())
    assert f"instead of\n{sum(dense.values()) / 2**20:,.1f} MiB" in (out / "README.md").read_text()
    modules = open_checkpoint(out).config.modules
    for row in inspection.modules:
        spec = modules.get(row.module)
        linears = [row.module] if spec is None else linears_of(row.module, spec)
        assert row.dense_nbytes == sum(dense[f"{linear}.weight"] for linear in linears)


@pytest.mark.parametrize("named", ["bfloat16", "float32"])
def test_norms_in_float32_leave_the_linears_in_their_dtype(named: str, tmp_path: Path):
    model = recast(tmp_path / "model", {"norm": torch.float32}, torch.bfloat16, named)
    report = compress(str(model), tmp_path / "out", small_recipe(), QUIET)
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    factors = {name: tensor for name, tensor in stored.items() if ".factor_" in name}
    assert {tensor.dtype for tensor in factors.values()} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in stored.items() if "norm" in name} == {torch.float32}
    assert sum(tensor.nbytes for tensor in factors.values()) == 2 * report.stored_parameters
    check_against_dense(model, tmp_path / "out")


def test_linears_of_several_dtypes(tmp_path: Path):
    """Each has its own; those that share factors, the one that holds all of them."""
    own = {"q_proj": torch.float32, "down_proj": torch.float16}
    model = recast(tmp_path / "model", own, torch.bfloat16, "bfloat16")
    recipe = small_recipe(block_refinement={"epochs": 1, "held_out": 0.25}, tokens=128, seq_len=32)
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = recipe.model_copy(update={"calibration": str(tmp_path / "text.txt")})
    compress(str(model), tmp_path / "out", recipe, QUIET)
    checkpoint = open_checkpoint(tmp_path / "out")
    expected = {
        "qkv_proj": torch.float32,
        "o_proj": torch.bfloat16,
        "gate_up_proj": torch.bfloat16,
        "down_proj": torch.float16,
    }
    for name in checkpoint.config.modules:
        for suffix in ("factor_in", "factor_out"):
            dtype = checkpoint.files.info[f"{name}.{suffix}"].dtype
            assert dtype == expected[name.rpartition(".")[2]]
    check_against_dense(model, tmp_path / "out")
    # transformers computes what the multiplied-out weights do.
    loaded, plain = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (tmp_path / "out", model)
    )
    with torch.no_grad():
        for name, spec in checkpoint.config.modules.items():
            dense = checkpoint.factors(name).dense(torch.float64)
            parts = dense.split(list(spec.out_features))
            for linear, part in zip(linears_of(name, spec), parts, strict=True):
                plain.get_submodule(linear).weight.copy_(part)
        tokens = random_tokens(2, 24)
        torch.testing.assert_close(
            loaded(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"weights": "int8"}])
def test_bytes_are_compared_with_the_dense_file(fields: dict, tmp_path: Path):
    """A float32 file whose config.json says bfloat16."""
    model = recast(tmp_path / "model", {}, torch.float32, "bfloat16")
    compress(str(model), tmp_path / "out", small_recipe(**fields), QUIET)
    check_against_dense(model, tmp_path / "out")


def test_a_model_that_names_no_dtype_gets_that_of_its_linears(tmp_path: Path):
    model = recast(tmp_path / "model", {"norm": torch.float32}, torch.bfloat16, "")
    compress(str(model), tmp_path / "out", small_recipe(), QUIET)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float64, "weight is float64, which factors cannot be stored in; give --dtype float"),
        (torch.float8_e4m3fn, "weight is float8_e4m3fn, which factors cannot .*; give --dtype "),
        (torch.int8, "weight is int8, which is no floating-point weight; give the original model"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_the_start(
    dtype: torch.dtype, message: str, tmp_path: Path
):
    model = recast(tmp_path / "model", {"up_proj": dtype}, torch.bfloat16, "bfloat16")
    with pytest.raises(UserError, match=message):
        compress(str(model), tmp_path / "out", small_recipe(), QUIET)
    assert not (tmp_path / "out.partial").exists()
    if dtype.is_floating_point:
        compress(str(model), tmp_path / "out", small_recipe(dtype="bfloat16"), QUIET)
        check_against_dense(model, tmp_path / "out")


def int8_rows(factors: StoredFactors, rows: torch.Tensor) -> Int8Part:
    inner, outer = (
        Int8Matrix(factors.tensors[name], factors.tensors[f"{name}_scale"])
        for name in ("factor_in", "factor_out")
    )
    mine = Int8Matrix(outer.values[rows], outer.scale[rows])
    return Int8Part(inner, mine, factors.tensors.get("pivots"))


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_the_logged_errors_are_those_of_the_stored_weights(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """κ near 1 in bfloat16, where rounding on the way was greater than the error itself.

    The oracle runs the multiplied-out checkpoint and the teacher in float64 over all tokens; with
    int8 it rounds activations as int8 kernels are defined to do.
    """
    model = save_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text(TEXT)
    drawn: list[torch.Tensor] = []
    draw = job.start
    monkeypatch.setattr(job, "start", lambda *given: drawn.append(draw(*given)) or drawn[0])
    recipe = make_recipe(
        method="saes-svd",
        allocator="uniform",
        keep=0.99,
        tokens=512,
        seq_len=32,
        weights=weights,
        calibration=str(tmp_path / "text.txt"),
    )
    compress(str(model), tmp_path / "out", recipe, QUIET)
    checkpoint = open_checkpoint(tmp_path / "out")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval() for _ in range(2)
    )
    states: dict[int, list[torch.Tensor]] = {}
    inputs: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, spec in checkpoint.config.modules.items():
            factors = checkpoint.factors(name)
            parts = factors.dense(torch.float64).split(list(spec.out_features))
            rows = torch.arange(spec.stacked).split(list(spec.out_features))
            for linear, part, mine in zip(linears_of(name, spec), parts, rows, strict=True):
                module = student.get_submodule(linear)
                module.weight.copy_(part)
                module.register_forward_pre_hook(
                    lambda _module, given, name=name: inputs.update({name: given[0]})
                )
                if weights == "int8":
                    module.forward = partial(reference.int8_linear, part=int8_rows(factors, mine))
        for index in range(3):
            for network in (teacher, student):
                network.model.layers[index].register_forward_hook(
                    lambda _module, _given, output, index=index: states.setdefault(
                        index, []
                    ).append(output[0] if isinstance(output, tuple) else output)
                )
        teacher(drawn[0])
        student(drawn[0])
        events = list(read_log(tmp_path / "out" / LOG_FILE))
        blocks = [event["error"] for event in events if event["event"] == "block"]
        true = [float((h_f - h).norm() / h_f.norm()) for h_f, h in states.values()]
        assert blocks == pytest.approx(true, rel=1e-3)
        logged = {event["module"]: event["error"] for event in events if event["event"] == "group"}
        for name, spec in checkpoint.config.modules.items():
            pairs = [
                (teacher.get_submodule(linear).weight, student.get_submodule(linear).weight)
                for linear in linears_of(name, spec)
            ]
            before, after = (torch.cat(list(part)) for part in zip(*pairs, strict=True))
            x = inputs[name].flatten(0, 1).T
            error = float(((before - after) @ x).norm() / (before @ x).norm())
            # The inputs that a method sees are those of the recipe's precision.
            assert logged[name] == pytest.approx(error, rel=0.03)
