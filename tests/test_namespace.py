"""The folders are source roots of one namespace package (design.md, Folders)."""

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
        ("transformers", {"building.py", "sampling.py", "evaluate.py", "hf.py", "smollm.py"}),
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
