"""The entry point that vLLM calls in each of its processes."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from svdserve.server import plugin

pytestmark = pytest.mark.vllm

TWICE = """
from svdserve.server.plugin import register
register(); register()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.config import LoadConfig
print(QUANTIZATION_METHODS.count("svdserve"), get_quantization_config("svdserve").__name__)
for chosen in ("auto", "hf", "safetensors", "svdserve", "pt", "dummy"):
    print(chosen, type(get_model_loader(LoadConfig(load_format=chosen))).__name__)
"""


def test_vllm_finds_the_entry_point() -> None:
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "svdserve"]
    assert found.load() is plugin.register


def test_importing_the_plugin_does_not_import_vllm() -> None:
    code = "import sys, svdserve.server.plugin; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_registers_once_and_leaves_other_loaders_alone() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=True)
    assert "will be overwritten" not in done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "INFO" not in line]
    assert lines[-7:] == [
        "1 SvdserveConfig",
        "auto SvdserveModelLoader",
        "hf SvdserveModelLoader",
        "safetensors SvdserveModelLoader",
        "svdserve SvdserveModelLoader",
        "pt DefaultModelLoader",
        "dummy DummyModelLoader",
    ]


def test_warns_outside_the_tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin.unsupported_version() is None
    monkeypatch.setattr(plugin, "SUPPORTED_CPU", ("0.1", "0.2"))
    monkeypatch.setattr(plugin, "SUPPORTED_GPU", ("0.1", "0.2"))
    warning = plugin.unsupported_version()
    assert warning is not None
    assert warning.startswith("svdserve is tested with vLLM >=0.1,<0.2 on this platform, found 0.")
