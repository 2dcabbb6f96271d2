"""The format: what a valid directory gives, and that every broken one is refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from models import save_model
from svdserve.compression.format.layouts import LAYOUTS
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.schema import CheckpointConfig, parse_config
from svdserve.compression.format.tensors import INDEX_FILE, SINGLE_FILE, TensorFiles
from svdserve.compression.format.writer import merge_shards
from svdserve.compression.system.errors import UserError

MODULE = "model.layers.1.self_attn.qkv_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2", tmp_path_factory.mktemp("dense"))


@pytest.fixture
def directory(dense: Path, tmp_path: Path) -> Path:
    return write_checkpoint(dense, tmp_path / "small", layout="interpolative", shared=True)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def edit_module(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"][MODULE].update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / SINGLE_FILE
    tensors = load_file(path)
    for suffix, value in changes.items():
        tensors.pop(f"{MODULE}.{suffix}", None)
        if value is not None:
            tensors[f"{MODULE}.{suffix}"] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False])
def test_a_written_checkpoint_reads_back(dense: Path, tmp_path: Path, layout, shared: bool):
    out = write_checkpoint(
        dense, tmp_path / "out", layout=layout, shared=shared, reference=tmp_path / "product"
    )
    checkpoint = open_checkpoint(out)
    check_finite(checkpoint)
    product = load_file(tmp_path / "product" / SINGLE_FILE)
    for name, spec in checkpoint.config.modules.items():
        parent = name.rpartition(".")[0]
        want = torch.cat([product[f"{parent}.{member}.weight"] for member in spec.members])
        torch.testing.assert_close(checkpoint.factors(name).dense(), want, rtol=1e-4, atol=1e-5)
    sizes = checkpoint.stored_bytes()
    file_bytes = sum(t.nbytes for t in load_file(out / SINGLE_FILE).values())
    assert sizes["lowrank"] + sizes["dense"] == file_bytes
    assert sizes["dense_equivalent"] == sum(t.nbytes for t in product.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq', not 'svdserve'"),
        ({"format_version": 3}, "format_version 3 is not supported .*reads 1 and 2"),
        ({"format_version": "1"}, "format_version '1' is not supported"),
        ({"keep": 0}, "keep: .*greater than 0"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"modules": {}}, r"model.layers.0.*factor_in belongs to no module"),
    ],
)
def test_broken_configurations(directory: Path, changes: dict[str, Any], message: str):
    edit_config(directory, **changes)
    with pytest.raises(UserError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, f"{MODULE}.rank: .*greater than 0"),
        ({"rank": 4000}, "rank 4000 is above min"),
        ({"layout": "cube"}, f"{MODULE}.layout"),
        ({"members": ["q_proj", "k_proj"]}, "2 members but 3 sizes"),
        ({"members": ["q_proj", "k_proj", "w_proj"]}, "expected .*'v_proj'"),
        ({"in": 127}, f"module {MODULE}: factor_in is"),
        ({"rank": 5}, f"module {MODULE}: factor_in is .* expected \\[5, 123\\]"),
    ],
)
def test_broken_modules(directory: Path, changes: dict[str, Any], message: str):
    edit_module(directory, **changes)
    with pytest.raises(UserError, match=message):
        open_checkpoint(directory)


def test_broken_tensors(directory: Path):
    whole = open_checkpoint(directory).factors(MODULE)
    assert whole.pivots is not None
    repeated = whole.pivots.clone()
    repeated[0] = repeated[1]
    outside = whole.pivots.clone()
    outside[0] = 128
    cases: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({"factor_out": None}, f"tensor {MODULE}.factor_out is missing"),
        ({"factor_in": whole.factor_in[:, 1:].contiguous()}, "factor_in is"),
        ({"factor_in": whole.factor_in.double()}, "factor_in is torch.float64, allowed"),
        ({"factor_in": whole.factor_in.half()}, "differ in dtype"),
        ({"pivots": whole.pivots.long()}, "pivots is torch.int64, allowed"),
        ({"pivots": repeated}, "pivots are repeated"),
        ({"pivots": outside}, r"pivots must lie in 0..127"),
        ({"pivots": -whole.pivots - 1}, "pivots must lie in"),
    ]
    for changes, message in cases:
        edit_tensors(directory, **changes)
        with pytest.raises(UserError, match=message) as caught:
            open_checkpoint(directory)
        assert MODULE in str(caught.value)
        edit_tensors(
            directory,
            factor_in=whole.factor_in,
            factor_out=whole.factor_out,
            pivots=whole.pivots,
        )
    open_checkpoint(directory)


def test_a_factored_weight_must_not_be_stored_dense_as_well(directory: Path):
    tensors = load_file(directory / SINGLE_FILE)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(64, 128)
    save_file(tensors, directory / SINGLE_FILE)
    with pytest.raises(UserError, match=r"k_proj.weight is stored as well"):
        open_checkpoint(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_factors_are_named(directory: Path, value: float):
    factors = open_checkpoint(directory).factors(MODULE)
    factors.factor_out[3, 2] = value
    edit_tensors(directory, factor_out=factors.factor_out)
    with pytest.raises(UserError, match=f"module {MODULE}: factor_out is not finite"):
        check_finite(open_checkpoint(directory))


def test_a_linear_belongs_to_one_module():
    spec = {"layout": "pair", "rank": 2, "in": 8, "out": [8]}
    block = {
        "quant_method": "svdserve",
        "format_version": 1,
        "base_model": "m",
        "keep": 0.5,
        "modules": {
            "a.up_proj": {**spec, "members": ["up_proj"]},
            "a.gate_up_proj": {**spec, "members": ["gate_proj", "up_proj"], "out": [8, 8]},
        },
    }
    with pytest.raises(UserError, match=r"a.up_proj is factored by a.up_proj and by"):
        parse_config(block)


def test_the_written_block_parses_to_itself(directory: Path):
    config = open_checkpoint(directory).config
    assert parse_config(json.loads(json.dumps(config.dump()))) == config
    assert isinstance(config, CheckpointConfig)


def test_truncated_and_pickled_files_are_refused(directory: Path):
    path = directory / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        open_checkpoint(directory)
    path.rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="svdserve reads safetensors only"):
        open_checkpoint(directory)


def test_a_file_that_may_not_be_read_is_not_called_missing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
):
    (directory / SINGLE_FILE).chmod(0)
    directory.chmod(0o755)
    monkeypatch.chdir(directory)  # pytest's folders above it are for their owner only
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            TensorFiles(Path())
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("limit", [10**9, 70_000, 1])
def test_merged_shards_hold_the_same_tensors(tmp_path: Path, limit: int):
    parts, want = [], {}
    for i in range(4):
        tensors = {
            f"t{i}.{j}": torch.randn(50 + j, 60, dtype=torch.float32).to(dtype)
            for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.int32))
        }
        want |= tensors
        parts.append(tmp_path / f"part{i}")
        save_file(tensors, parts[-1])
    target = tmp_path / "out"
    target.mkdir()
    merge_shards(parts, target, limit)
    files = TensorFiles(target)
    got = files.load(list(files.info))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    shards = {10**9: 1, 70_000: 2, 1: 4}[limit]
    assert len(list(target.glob("*.safetensors"))) == shards
    assert (target / INDEX_FILE).exists() == (shards > 1)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, "file names of this directory"),
        ({"a": "missing.safetensors"}, "missing.safetensors is missing"),
        ({"b": "part.safetensors"}, "b is not in part.safetensors"),
        (["a"], "must map tensor names"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, weight_map: Any, message: str):
    save_file({"a": torch.zeros(2)}, tmp_path / "part.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        TensorFiles(tmp_path)
