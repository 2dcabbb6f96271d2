"""Kernels know nothing that is above them, and choosing one imports no Triton kernel."""

import subprocess
import sys
from pathlib import Path

import svdserve.kernels

FOLDER = Path(svdserve.kernels.__file__).parent


def loaded_by(statement: str) -> set[str]:
    """The modules of a fresh process after a statement."""
    command = [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_nothing_of_svdserve_but_kernels_is_imported() -> None:
    names = [
        ".".join(("svdserve.kernels", *file.relative_to(FOLDER).with_suffix("").parts))
        for file in FOLDER.rglob("*.py")
        if "triton" not in file.relative_to(FOLDER).parts
    ]
    names += ["svdserve.kernels.triton.configs", "svdserve.kernels.triton.table"]
    assert len(names) > 10
    loaded = loaded_by("import " + ", ".join(name.removesuffix(".__init__") for name in names))
    own = {name for name in loaded if name.startswith("svdserve.")}
    assert {name for name in own if not name.startswith("svdserve.kernels")} == set()
    assert not loaded & {"vllm", "transformers", "svdserve.kernels.triton.linear"}


def test_no_file_names_what_is_above() -> None:
    above = ("svdserve.compression", "svdserve.server", "svdserve.bench", "svdserve.cli")
    for file in FOLDER.rglob("*.py"):
        lines = [line for line in file.read_text().splitlines() if "import" in line]
        assert not [line for line in lines if any(name in line for name in above)], file
