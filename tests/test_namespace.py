"""The folders are source roots of one namespace package (design.md, Folders)."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("part", ["compression", "kernels", "server"])
def test_no_init_turns_a_root_into_a_package(part: str):
    """``compression`` is a standard-library package from Python 3.14 on: do not shadow it."""
    assert (ROOT / part / "svdserve" / part).is_dir()
    assert not (ROOT / part / "__init__.py").exists()
    assert not (ROOT / part / "svdserve" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("transformers", {"building.py", "sampling.py", "loading.py", "hf.py"}),
        ("vllm", set()),
    ],
)
def test_heavy_libraries_stay_in_their_modules(library: str, allowed: set[str]):
    importing = {
        file.name
        for part in ("compression", "kernels")
        for file in (ROOT / part).rglob("*.py")
        for line in file.read_text().splitlines()
        if line.strip().startswith((f"import {library}", f"from {library}"))
    }
    assert importing <= allowed


def test_the_wheel_holds_the_package_and_nothing_that_python_runs_when_it_starts(tmp_path: Path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {"svdserve/compression/__init__.py", "svdserve/cli/main.py"} <= set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"svdserve"}
    assert not [name for name in names if name.endswith(".pth")]
