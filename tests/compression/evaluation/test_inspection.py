"""`svdserve inspect` against counts taken from the files themselves."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from models import save_model
from svdserve.compression.evaluation.inspection import inspect_checkpoint, print_inspection


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    dense = save_model("llama", root / "dense", num_hidden_layers=11)
    return write_checkpoint(
        dense,
        root / "small",
        layout="interpolative",
        shared=True,
        keep_dense=frozenset({"gate_up_proj"}),
        rank_rule=lambda module, m, n: 40,  # noqa: ARG005
    )


def test_counts_equal_the_files(checkpoint: Path) -> None:
    facts = inspect_checkpoint(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    assert facts.factored_nbytes + facts.other_nbytes == sum(sizes.values())
    for row in facts.modules:
        prefix = f"{row.module}."
        assert row.nbytes == sum(size for name, size in sizes.items() if name.startswith(prefix))
        own = {k: t for k, t in tensors.items() if k.startswith(prefix) and t.ndim == 2}
        assert row.parameters == sum(tensor.numel() for tensor in own.values())
        assert row.rank is None or row.rank < row.full_rank
        assert (row.parameters < row.dense_parameters) == (row.rank is not None)
    dense = load_file(checkpoint.parent / "dense" / "model.safetensors")
    assert facts.dense_equivalent_nbytes == sum(tensor.nbytes for tensor in dense.values())


def test_modules_are_in_the_order_of_the_model(checkpoint: Path) -> None:
    block = ["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rows = [row.module.split(".") for row in inspect_checkpoint(checkpoint).modules]
    assert [row[-1] for row in rows] == block * 11
    assert [int(row[2]) for row in rows] == [layer for layer in range(11) for _ in block]


def test_error_and_beta_come_from_the_log(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = "model.layers.0.self_attn.qkv_proj"
    entry = {"event": "group", "module": module, "rank": 40, "error": 0.25, "beta": 0.5}
    lines = [json.dumps({**entry, "error": 0.75}), json.dumps({"event": "block"}), "cut o"]
    log = checkpoint / "svdserve_log.jsonl"
    log.write_text("\n".join([*lines, json.dumps(entry)]))
    rows = {row.module: row for row in inspect_checkpoint(checkpoint).modules}
    assert (rows[module].error, rows[module].beta) == (0.25, 0.5)
    other = rows["model.layers.1.self_attn.qkv_proj"]
    assert (other.error, other.beta) == (None, None)
    for number in ("NaN", "1e999", "true", '"0.5"', "[]", "9" * 400, "9" * 9000):
        log.write_text(json.dumps(entry).replace("0.25", number))
        rows = {row.module: row for row in inspect_checkpoint(checkpoint).modules}
        assert rows[module].error is None, number
    log.unlink()
    print_inspection(inspect_checkpoint(checkpoint))
    assert "–" in capsys.readouterr().out
