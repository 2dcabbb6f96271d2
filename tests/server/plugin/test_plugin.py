"""The entry point that vLLM calls in each of its processes."""

import asyncio
import os
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.datastructures import State
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from checkpoints import write_checkpoint
from models import save_model
from svdserve.compression.system.errors import UserError
from svdserve.server.http.app import EndpointPlugin
from svdserve.server.http.shutdown import GracefulShutdown
from svdserve.server.layer_checks import VERIFY
from svdserve.server.plugin import plugin
from svdserve.server.plugin.loader import _name_kernels
from vllm_run import ENVIRONMENT, run

pytestmark = pytest.mark.vllm

TWICE = """
from svdserve.server.plugin.plugin import register
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
    code = "import sys, svdserve.server.plugin.plugin; print('vllm' in sys.modules)"
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


# A vLLM that has one of the names that svdserve needs elsewhere.
UNFIT = """
import sys
from vllm.model_executor.kernels import linear
del linear.CPUInt8ScaledMMLinearKernel
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader import get_model_loader
from vllm.config import LoadConfig
dense, small = sys.argv[1:]
options = dict(enforce_eager=True, max_model_len=64, dtype="float32", num_gpu_blocks_override=16)
engine = LLM(dense, **options)
print(type(get_model_loader(LoadConfig())).__name__)
prompt = {"prompt_token_ids": [5, 6, 7]}
(answer,) = engine.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
print(len(answer.outputs[0].token_ids))
try:
    LLM(small, **options)
except ValueError as error:
    print("refused:", *str(error).split())
"""


def test_a_vllm_that_does_not_fit_serves_all_other_models(tmp_path: Path) -> None:
    dense = save_model("llama", tmp_path / "dense", num_hidden_layers=1)
    small = write_checkpoint(dense, tmp_path / "small", layout="pair", shared=True)
    environment = os.environ | ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        [sys.executable, "-c", UNFIT, str(dense), str(small)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [*done.stderr.splitlines(), *done.stdout.splitlines()]
    told = [line for line in lines if "svdserve does not fit" in line]
    assert len(told) == 2  # in the log, and as the reason of the refusal
    assert "install vLLM >=0.32" in told[0]
    assert "(ImportError: cannot import name 'CPUInt8ScaledMMLinearKernel'" in told[1]
    printed = [line for line in done.stdout.splitlines() if "WARNING" not in line]
    assert printed == ["DefaultModelLoader", "4", told[1]]
    assert not [line for line in lines if "svdserve/" in line]  # no trace leads to it


def test_ray_platform_leaves_other_platforms_alone() -> None:
    """Where vLLM lacks what it is made of, and where a vendor's platform is installed."""
    code = (
        "import sys; from svdserve.server.plugin.ray.platform import platform;"
        "assert 'vllm' not in sys.modules;"
        "sys.modules['vllm.platforms.cpu'] = None; print(platform())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "None"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    dense = save_model("llama", folder / "dense", num_hidden_layers=1)
    return write_checkpoint(dense, folder / "small", layout="interpolative", shared=True)


def test_kernels_are_in_the_key_of_compiled_graphs(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def key(kernel: str, **given: object) -> tuple[str, dict[str, object]]:
        monkeypatch.setenv("SVDSERVE_KERNEL", kernel)
        arguments = EngineArgs(str(small), dtype="float32", max_model_len=64, **given)
        config = arguments.create_engine_config()
        _name_kernels(config)
        _name_kernels(config)  # a second model of the process
        return config.compute_hash(), config.additional_config

    first, chosen = key("")
    assert key("") == (first, chosen)
    assert key("torch")[0] != first
    theirs = {"theirs": [1], "svdserve": "words"}
    given, kept = key("", additional_config=theirs)
    assert given != first
    assert kept == chosen | theirs
    config = EngineArgs(str(small), dtype="float32", max_model_len=64).create_engine_config()
    config.additional_config = object()
    with pytest.raises(UserError, match="additional_config is object"):
        _name_kernels(config)


@pytest.mark.exhaustive
def test_another_kernel_compiles_its_own_graph(small: Path, tmp_path: Path) -> None:
    """Two starts on one cache: vLLM would hand the second the graph of the first."""
    engine = {"model": str(small), "dtype": "bfloat16", "enforce_eager": False}
    tokens = []
    for count, kernel in enumerate(["", "torch"], 1):
        (served,) = run(tmp_path, [dict(engine)], [[5, 6, 7, 8]], SVDSERVE_KERNEL=kernel)
        assert not served.error
        tokens.append(served.tokens)
        compiled = list((tmp_path / "torch_compile_cache" / "torch_aot_compile").iterdir())
        assert len(compiled) == count
    assert len(tokens[0][0]) == len(tokens[1][0])


def test_gauges_and_shutdown_do_not_stop_a_server_whose_vllm_names_things_otherwise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = object()  # without vllm_config, errored, shutdown
    asyncio.run(EndpointPlugin().init_state(engine, State(), Namespace()))
    assert "svdserve gauges are off: AttributeError" in caplog.text
    app = Starlette(
        routes=[Route("/", lambda _: PlainTextResponse("served"))],
        middleware=[Middleware(GracefulShutdown)],
    )
    app.state.engine_client = engine
    with TestClient(app) as client:
        assert client.get("/").text == "served"
    assert "A shutdown will not wait for the requests in flight" in caplog.text


def test_layers_that_were_to_be_verified_are_not_right_without_reports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VERIFY, "1")
    with pytest.raises(UserError, match="leave out --worker-extension-cls"):
        asyncio.run(EndpointPlugin().init_state(object(), State(), Namespace()))
