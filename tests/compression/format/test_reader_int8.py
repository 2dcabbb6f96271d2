"""Encoded matrices in a checkpoint: their bytes, and every way in which they can be broken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from models import save_model
from svdserve.compression.evaluation.inspection import inspect_checkpoint
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.system.errors import UserError

MODULE = "model.layers.1.self_attn.q_proj"
LINEAR = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2", tmp_path_factory.mktemp("dense"), dtype=torch.bfloat16)


@pytest.fixture
def small(dense: Path, tmp_path: Path) -> Path:
    return write_checkpoint(
        dense,
        tmp_path / "small",
        layout="pair",
        shared=False,
        keep_dense=frozenset({"o_proj"}),
        int8=True,
    )


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
    """Change the block of config.json."""
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
        (f"{LINEAR}.weight", None, f"int8 linear {LINEAR}: tensor .*weight is missing"),
        (f"{LINEAR}.weight", lambda t: t[0], f"int8 linear {LINEAR}: weight is .* two axes"),
        (f"{LINEAR}.weight", lambda t: t.float(), f"int8 linear {LINEAR}: .* is torch.float32, al"),
        (
            f"{LINEAR}.weight_scale",
            lambda t: t[1:],
            f"{LINEAR}: weight_scale is .* expected",
        ),
        (f"{MODULE}.factor_in_scale", lambda t: t * 0, f"{MODULE}: factor_in_scale must be pos"),
        (f"{LINEAR}.weight_scale", lambda t: -t, f"{LINEAR}: weight_scale must be positive"),
        (f"{LINEAR}.weight_scale", lambda t: t / 0, f"{LINEAR}: weight_scale is not finite"),
    ],
)
def test_broken_tensors_are_named(tensor: str, change: Any, message: str, small: Path) -> None:
    check_finite(open_checkpoint(small))
    tensors = load_file(small / SINGLE_FILE)
    if change is None:
        del tensors[tensor]
    else:
        tensors[tensor] = change(tensors[tensor]).contiguous()
    save_file(tensors, small / SINGLE_FILE)
    with pytest.raises(UserError, match=message):
        check_finite(open_checkpoint(small))


def test_broken_lists_of_linears(small: Path) -> None:
    block = json.loads((small / "config.json").read_text())["quantization_config"]
    linears, spec = block["linears"], {"role": "attention_in", "codec": "int8"}
    first = next(iter(linears))
    surplus = f"{first}.weight_scale belongs to no module"
    cases = [
        (linears | {MODULE: spec}, f"linears: {MODULE} belongs to {MODULE}"),
        ({n: s for n, s in linears.items() if n != first}, surplus),
        (linears | {first: {"role": "attention_out"}}, surplus),
        (linears | {"model.side_proj": spec}, "int8 linear model.side_proj: tensor .* is missing"),
        (linears | {"model.side_proj": {}}, "float linear model.side_proj: tensor .* is missing"),
        (linears | {first: spec | {"codec": "int3"}}, f"linears.{first}.codec: .*unknown codec"),
        (linears | {first: spec | {"role": "x"}}, f"linears.{first}.role: "),
        (linears | {first: spec | {"rank": 3}}, f"linears.{first}.rank: Extra inputs"),
        (linears | {"../x": spec}, r"linears.*\.\./x.*pattern"),
    ]
    for changed, message in cases:
        edit(small, linears=changed)
        with pytest.raises(UserError, match=message):
            open_checkpoint(small)
    edit(small, linears=linears)
    open_checkpoint(small)


def test_whole_linears_are_decoded(small: Path, dense: Path) -> None:
    checkpoint = open_checkpoint(small)
    assert checkpoint.config.encoded_linears == checkpoint.config.linears
    tensors = load_file(small / SINGLE_FILE)
    values, scale = tensors[f"{LINEAR}.weight"], tensors[f"{LINEAR}.weight_scale"]
    want = values.double() * scale.double()[:, None]
    assert torch.equal(checkpoint.weight(LINEAR, torch.float64), want)
    assert torch.equal(checkpoint.weight(LINEAR, torch.bfloat16), want.bfloat16())
    plain = write_checkpoint(
        dense,
        small.with_name("plain"),
        layout="pair",
        shared=False,
        keep_dense=frozenset({"o_proj"}),
    )
    checkpoint, weight = open_checkpoint(plain), load_file(dense / SINGLE_FILE)[f"{LINEAR}.weight"]
    assert LINEAR in checkpoint.config.linears
    assert checkpoint.config.encoded_linears == {}
    assert torch.equal(checkpoint.weight(LINEAR, weight.dtype), weight)
    edit(plain, linears={})  # as versions 1 and 2 have it
    assert torch.equal(open_checkpoint(plain).weight(LINEAR, weight.dtype), weight)
