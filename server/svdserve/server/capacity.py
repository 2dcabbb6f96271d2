"""Checks, before anything is loaded, that a model and its KV cache fit into this machine's memory.

The check is for CPUs only, where the operating system kills a process that needs too much memory
and gives no message. On GPUs vLLM plans within --gpu-memory-utilization and itself says what is
missing.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch

from svdserve.compression.format.tensors import TensorFiles
from svdserve.compression.system.errors import UserError

_ENV_KV_GIB = "VLLM_CPU_KVCACHE_SPACE"
_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


def check_memory(
    directory: Path,
    dtype: str,
    kv_cache_bytes: int | None,
    workers: int = 1,
    environment: Mapping[str, str] = os.environ,
    available: int | None = None,
) -> None:
    """Refuse a model that cannot fit; the memory of Python and the activations is not counted.

    Args:
        directory: of a model that check_model has accepted.
        dtype: the value of --dtype.
        kv_cache_bytes: the value of --kv-cache-memory-bytes. If it is None, vLLM plans the KV cache
            within --gpu-memory-utilization and checks that itself.
        workers: on this machine; each has a KV cache of that size and a share of the weights.
        environment: may hold vLLM's older variable for the KV cache, in GiB, which takes
            precedence.
        available: bytes; measured if None.

    Raises:
        UserError: the memory does not suffice (the message names the bytes and the flags to
            change), or vLLM's older variable is no whole number.
    """
    flag, cache = "--kv-cache-memory-bytes", kv_cache_bytes or 0
    if legacy := environment.get(_ENV_KV_GIB, ""):
        if not legacy.isdecimal():
            raise UserError(f"{_ENV_KV_GIB}={legacy}: give a whole number of GiB")
        flag, cache = _ENV_KV_GIB, int(legacy) << 30
    weights = weight_bytes(directory, dtype)
    if available is None:
        available = available_bytes()
    if weights + workers * cache <= available:
        return
    advice = f"lower {flag}" if weights < available else "compress it to a lower --keep"
    caches = f" and {workers} KV caches of {cache:,} bytes" if workers > 1 else ""
    caches = caches or (f" and {cache:,} bytes of KV cache" if cache else "")
    raise UserError(
        f"out of memory: {directory} needs {weights + workers * cache:,} bytes, {weights:,} of "
        f"weights{caches}, and {available:,} are available; {advice}, or free memory"
    )


def weight_bytes(directory: Path, dtype: str) -> int:
    """Bytes of all tensors once they are loaded; dtype ``auto`` stores float32 in 16 bits."""
    chosen = _DTYPES.get(dtype)
    total = 0
    for info in TensorFiles(directory).info.values():
        size = info.dtype.itemsize
        if info.dtype.is_floating_point and size > 1:
            size = chosen.itemsize if chosen is not None else 2
        total += size * torch.Size(info.shape).numel()
    return total


def available_bytes(
    groups: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that this process may still allocate on the machine and in its control groups."""
    return min((psutil.virtual_memory().available, *_group_limits(groups, mounts)))


def _group_limits(groups: Path, mounts: Path) -> Iterator[int]:
    """Room in each control group above this process; page cache counts as room."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = mounts, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = mounts / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        # In a container the path may be the host's; the container's own group is then mounted as
        # the root.
        for level in (folder, *folder.parents):
            if not level.is_relative_to(root):
                break
            try:
                maximum, used = (level / limit).read_text(), (level / usage).read_text()
                cache = _page_cache((level / "memory.stat").read_text())
            except OSError:
                continue
            if maximum.strip().isdecimal():
                yield max(0, int(maximum) - int(used) + cache)


def _page_cache(statistics: str) -> int:
    fields = dict(line.split() for line in statistics.splitlines())
    return sum(int(fields.get(name, 0)) for name in ("active_file", "inactive_file"))


def add_memory_flags(parser: argparse.ArgumentParser) -> None:
    """Add those of vLLM's flags that decide how much memory is needed, with vLLM's defaults."""
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-memory-bytes", "--kv_cache_memory_bytes", type=_number)
    parser.add_argument("--tensor-parallel-size", "--tensor_parallel_size", "-tp", type=int)
    parser.add_argument("--nnodes", "-n", type=int, default=1)


def _number(text: str) -> int:
    """An integer as vLLM reads it: 25.6k is decimal, 4K is binary."""
    powers = {letter: 1000 ** (n + 1) for n, letter in enumerate("kmgt")}
    powers |= {letter: 1024 ** (n + 1) for n, letter in enumerate("KMGT")}
    if text[-1:] in powers:
        return int(float(text[:-1]) * powers[text[-1]])
    return int(text)
