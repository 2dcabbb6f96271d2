"""The files of a directory, before anything is known of what they hold."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from svdserve.compression.format.tensors import INDEX_FILE, SINGLE_FILE, TensorFiles
from svdserve.compression.system.errors import UserError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file({"a": torch.randn(64, 8)}, tmp_path / SINGLE_FILE)
    return tmp_path


def test_truncated_and_pickled_files_are_refused(directory: Path):
    path = directory / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        TensorFiles(directory)
    path.rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="svdserve reads safetensors only"):
        TensorFiles(directory)


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
