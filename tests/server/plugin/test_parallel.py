"""Pipeline stages, Ray nodes, and what tensor parallelism sums: the real vLLM on several ranks."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_served_logits import PROMPTS, Case, assert_equals_dense

from checkpoints import write_checkpoint
from models import save_model
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.system.errors import UserError
from vllm_run import run

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[3]
CASE = Case("llama", "interpolative", shared=True)
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
# Traced as vLLM traces it before it compiles, which is what later stages need; but not compiled.
STAGES = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint and its reference, whose output head is the embedding of the first stage."""
    root = tmp_path_factory.mktemp("parallel")
    CASE.write(root, tie_word_embeddings=True, **SHAPE)
    return root


def model(root: Path, **arguments: Any) -> dict[str, Any]:
    return {"model": str(root / str(CASE)), **arguments}


@pytest.mark.exhaustive
def test_pipeline_stages_alone_and_with_tensor_parallel_ranks(root: Path) -> None:
    """Each stage loads its own layers; the last one also the embedding, as the output head."""
    engines = [
        model(root, pipeline_parallel_size=2, tensor_parallel_size=ranks, **STAGES)
        for ranks in (1, 2)
    ]
    for ranks, served in zip((1, 2), run(root / "stages", engines, PROMPTS), strict=True):
        assert_equals_dense(served, root / CASE.reference)
        reports = [report for report in served.reports if report is not None]
        assert [report["layers"] for report in reports] == [2 * 4] * 2 * ranks


def test_eager_pipeline_stages_are_refused_on_a_cpu() -> None:
    from vllm.config import CompilationConfig, CompilationMode, ParallelConfig, VllmConfig

    from svdserve.server.plugin.loader import _require_compiled_pipeline

    eager = CompilationConfig(mode=CompilationMode.NONE)
    for stages in (1, 2):
        parallel = ParallelConfig(pipeline_parallel_size=stages)
        config = VllmConfig(parallel_config=parallel, compilation_config=eager)
        if stages == 1:
            _require_compiled_pipeline(config)
            continue
        with pytest.raises(UserError, match="leave out --enforce-eager"):
            _require_compiled_pipeline(config)


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("ray") is None, reason="needs pip install 'svdserve[ray]'")
def test_ray_nodes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline stage on each of two nodes, which are processes of this machine."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        engine = model(root, pipeline_parallel_size=2, distributed_executor_backend="ray", **STAGES)
        (served,) = run(root / "ray", [engine], PROMPTS, RAY_ADDRESS=cluster.address)
    finally:
        cluster.shutdown()
    assert_equals_dense(served, root / CASE.reference)
    assert [report["layers"] for report in served.reports if report] == [2 * 4] * 2


@pytest.mark.exhaustive
def test_ranks_are_summed_instead_of_outputs(tmp_path: Path) -> None:
    """The benchmark counts what the engine sums; here beside the shapes of the factors."""
    dense = save_model("llama", tmp_path / "dense", dtype=torch.bfloat16)
    low = write_checkpoint(dense, tmp_path / "low", layout="interpolative", shared=True)
    out = tmp_path / "allreduce.json"
    script = ROOT / "benchmarks" / "serving" / "serving_allreduce.py"
    command = [sys.executable, str(script), str(dense), str(low), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    hidden = read_json(dense / "config.json")["hidden_size"]
    layers = read_json(dense / "config.json")["num_hidden_layers"]
    with safe_open(low / SINGLE_FILE, "pt") as tensors:
        ranks = [
            tensors.get_slice(f"model.layers.{layer}.{name}.factor_out").get_shape()[1]
            for layer in range(layers)
            for name in ("self_attn.o_proj", "mlp.down_proj")
        ]
    counted = [found["bytes_per_token"] for found in json.loads(out.read_text())["models"]]
    assert counted == [2 * hidden * (1 + 2 * layers), 2 * (hidden + sum(ranks))]
