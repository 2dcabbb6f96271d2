"""What a model needs, what the machine has, and the refusal in between."""

from pathlib import Path

import psutil
import pytest
import torch

from checkpoints import write_checkpoint
from files import file_bytes
from models import save_model
from servers import refusal
from svdserve.compression.system.errors import UserError
from svdserve.server.capacity import available_bytes, check_memory, weight_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capacity")
    dense = save_model("llama", folder / "dense", torch.bfloat16)
    return write_checkpoint(dense, folder / "small", layout="pair", shared=True)


def test_weights_are_counted_in_the_dtype_that_is_loaded(model: Path) -> None:
    stored = sum(file_bytes(model).values())
    assert weight_bytes(model, "auto") == stored
    assert weight_bytes(model, "bfloat16") == stored
    assert weight_bytes(model, "float32") == 2 * stored


def test_int8_stays_int8(tmp_path: Path) -> None:
    dense = save_model("llama", tmp_path / "dense", torch.bfloat16)
    model = write_checkpoint(
        dense, tmp_path / "int8", layout="interpolative", shared=True, int8=True
    )
    stored = sum(file_bytes(model).values())
    assert stored / 2 < weight_bytes(model, "bfloat16") <= stored


def test_what_does_not_fit_is_refused_in_bytes(model: Path) -> None:
    weights = weight_bytes(model, "auto")
    check_memory(model, "auto", 1000, environment={}, available=weights + 1000)
    with pytest.raises(UserError, match=f"{weights + 1000:,} bytes.*--kv-cache-memory-bytes"):
        check_memory(model, "auto", 1000, environment={}, available=weights + 999)
    with pytest.raises(UserError, match="2 KV caches of 1,000 bytes"):
        check_memory(model, "auto", 1000, 2, environment={}, available=weights + 1999)
    with pytest.raises(UserError, match=r"lower --keep"):
        check_memory(model, "auto", None, environment={}, available=weights - 1)


def test_the_older_variable_wins_as_in_vllm(model: Path) -> None:
    environment = {"VLLM_CPU_KVCACHE_SPACE": "3"}
    with pytest.raises(UserError, match=f"{3 << 30:,} bytes of KV cache.*VLLM_CPU_KVCACHE_SPACE"):
        check_memory(model, "auto", 1000, environment=environment, available=3 << 30)
    with pytest.raises(UserError, match="whole number"):
        check_memory(model, "auto", None, environment={"VLLM_CPU_KVCACHE_SPACE": "1.5"})


def test_the_command_refuses_before_it_loads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = psutil.virtual_memory().total + weight_bytes(model, "auto")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")
    total = psutil.virtual_memory().total
    line = refusal(model, "--port", "0", "--kv-cache-memory-bytes", str(total), environment={})
    assert f"{needed:,} bytes" in line
    assert "lower --kv-cache-memory-bytes" in line


def write_group(folder: Path, names: tuple[str, str], limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    statistics = f"anon 1\nactive_file {cache // 2}\ninactive_file {cache - cache // 2}\n"
    (folder / "memory.stat").write_text(statistics)


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    groups, mounts = tmp_path / "cgroup", tmp_path / "mounts"
    groups.write_text("0::/system.slice/svdserve.service\n")
    write_group(mounts / "system.slice/svdserve.service", V2, "max", 10, 0)
    assert available_bytes(groups, mounts) == pytest.approx(
        psutil.virtual_memory().available, rel=0.2
    )
    write_group(mounts / "system.slice", V2, "5000", 3000, 1000)
    assert available_bytes(groups, mounts) == 3000
    write_group(mounts / "system.slice/svdserve.service", V2, "600", 700, 0)
    assert available_bytes(groups, mounts) == 0


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    groups, mounts = tmp_path / "cgroup", tmp_path / "mounts"
    groups.write_text("5:cpu,cpuacct:/a\n4:memory:/only/the/host/knows\n")
    write_group(mounts / "memory", V1, "5000", 3000, 1000)
    assert available_bytes(groups, mounts) == 3000


def test_no_control_groups(tmp_path: Path) -> None:
    available = available_bytes(tmp_path / "absent", tmp_path)
    assert available == pytest.approx(psutil.virtual_memory().available, rel=0.2)
