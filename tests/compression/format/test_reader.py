"""The format: what a valid directory gives, and that every broken one is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from models import save_model
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.schema import CheckpointConfig, parse_config
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.system.errors import UserError

MODULE = "model.layers.1.self_attn.qkv_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2", tmp_path_factory.mktemp("dense"))


@pytest.fixture
def directory(dense: Path, tmp_path: Path) -> Path:
    return write_checkpoint(dense, tmp_path / "small", layout="interpolative", shared=True)


def edit(directory: Path, module: str = "", **changes: Any) -> None:
    """Change the block of config.json, or one of its modules."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    block = config["quantization_config"]
    (block["modules"][module] if module else block).update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / SINGLE_FILE
    tensors = load_file(path)
    for suffix, value in changes.items():
        tensors.pop(f"{MODULE}.{suffix}", None)
        if value is not None:
            tensors[f"{MODULE}.{suffix}"] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["pair", "interpolative"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_written_checkpoint_reads_back(dense: Path, tmp_path: Path, layout: str, shared: bool):
    out = write_checkpoint(
        dense, tmp_path / "out", layout=layout, shared=shared, reference=tmp_path / "product"
    )
    checkpoint = open_checkpoint(out)
    check_finite(checkpoint)
    product = load_file(tmp_path / "product" / SINGLE_FILE)
    for name, spec in checkpoint.config.modules.items():
        parent = name.rpartition(".")[0]
        want = torch.cat([product[f"{parent}.{member}.weight"] for member in spec.members])
        factors = checkpoint.factors(name)
        assert factors.rank == spec.rank
        torch.testing.assert_close(factors.dense(torch.float32), want, rtol=1e-4, atol=1e-5)
    sizes = checkpoint.stored_bytes()
    file_bytes = sum(t.nbytes for t in load_file(out / SINGLE_FILE).values())
    assert sizes["lowrank"] + sizes["dense"] == file_bytes
    assert sizes["dense_equivalent"] == sum(t.nbytes for t in product.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq', not 'svdserve'"),
        ({"format_version": 4}, "format_version 4 is not supported .*reads 1, 2, 3"),
        ({"format_version": "3"}, "format_version '3' is not supported"),
        ({"format_version": None}, "format_version None is not supported"),
        ({"keep": 0}, "keep: .*greater than 0"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"int8_linears": []}, "int8_linears: Extra inputs"),
        ({"linears": []}, "linears: .*dictionary"),
        ({"modules": {}}, r"model.layers.0.*factor_in belongs to no module"),
    ],
)
def test_broken_configurations(directory: Path, changes: dict[str, Any], message: str):
    edit(directory, **changes)
    with pytest.raises(UserError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, f"{MODULE}.rank: .*greater than 0"),
        ({"rank": 4000}, "rank 4000 is above min"),
        ({"layout": "cube"}, f"{MODULE}.layout: .*unknown layout 'cube'; allowed: inter"),
        ({"codec": "int3"}, f"{MODULE}.codec: .*unknown codec 'int3'; allowed: float, int8"),
        ({"codec": "int8"}, f"module {MODULE}: factor_in is torch.float32, allowed"),
        ({"role": "leader"}, f"{MODULE}.role: .*'attention_in'"),
        ({"weights": "float"}, f"{MODULE}.weights: Extra inputs"),
        ({"members": ["q_proj", "k_proj"]}, "2 members but 3 sizes"),
        ({"members": ["q_proj", "k_proj", "w[x]"]}, f"{MODULE}.members.2: .*pattern"),
        ({"members": []}, f"{MODULE}.members: .*at least 1"),
        (
            {"members": ["q_proj"], "out": [256]},
            "its one member is q_proj; it must have the same name",
        ),
        ({"members": ["q_proj", "q_proj", "v_proj"]}, f"q_proj is factored by {MODULE} and by"),
        ({"members": ["q_proj", "k_proj", "o_proj"]}, "o_proj is factored by .* and by"),
        ({"in": 127}, f"module {MODULE}: factor_in is"),
        ({"rank": 5}, f"module {MODULE}: factor_in is .* expected \\[5, 123\\]"),
    ],
)
def test_broken_modules(directory: Path, changes: dict[str, Any], message: str):
    edit(directory, MODULE, **changes)
    with pytest.raises(UserError, match=message):
        open_checkpoint(directory)


def test_broken_tensors(directory: Path):
    whole = dict(open_checkpoint(directory).factors(MODULE).tensors)
    inner, pivots = whole["factor_in"], whole["pivots"]
    repeated = pivots.clone()
    repeated[0] = repeated[1]
    outside = pivots.clone()
    outside[0] = 128
    cases: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({"factor_out": None}, f"tensor {MODULE}.factor_out is missing"),
        ({"factor_in": inner[:, 1:].contiguous()}, "factor_in is"),
        ({"factor_in": inner.double()}, "factor_in is torch.float64, allowed"),
        ({"factor_in": inner.half()}, "differ in dtype"),
        ({"pivots": pivots.long()}, "pivots is torch.int64, allowed"),
        ({"pivots": repeated}, "pivots are repeated"),
        ({"pivots": outside}, r"pivots must lie in 0..127"),
        ({"pivots": -pivots - 1}, "pivots must lie in"),
    ]
    for changes, message in cases:
        edit_tensors(directory, **changes)
        with pytest.raises(UserError, match=message) as caught:
            open_checkpoint(directory)
        assert MODULE in str(caught.value)
        edit_tensors(directory, **whole)
    open_checkpoint(directory)


def test_a_factored_weight_must_not_be_stored_dense_as_well(directory: Path):
    tensors = load_file(directory / SINGLE_FILE)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(64, 128)
    save_file(tensors, directory / SINGLE_FILE)
    with pytest.raises(UserError, match=r"k_proj.weight is stored as well"):
        open_checkpoint(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_factors_are_named(directory: Path, value: float):
    outer = open_checkpoint(directory).factors(MODULE).tensors["factor_out"]
    outer[3, 2] = value
    edit_tensors(directory, factor_out=outer)
    with pytest.raises(UserError, match=f"module {MODULE}: factor_out is not finite"):
        check_finite(open_checkpoint(directory))


@pytest.mark.parametrize("version", [1, 3])
def test_a_linear_belongs_to_one_module(version: int):
    spec = {"layout": "pair", "rank": 2, "in": 8, "out": [8]}
    block = {
        "quant_method": "svdserve",
        "format_version": version,
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
