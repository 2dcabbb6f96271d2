"""The served compressed model equals the dense model that its factors multiply out to.

Two references: that dense model served by vLLM, and the same in transformers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from models import random_tokens, save_model
from svdserve.compression.factors import LAYOUTS, Layout
from svdserve.kernels.cpu import unsupported
from vllm_run import Served, run

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4  # of a log probability, float32; rounding between the two engines is about 1e-5
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 30)]


@dataclass(frozen=True)
class Case:
    architecture: str
    layout: Layout
    shared: bool

    @property
    def reference(self) -> str:
        return f"{self.architecture}-{'shared' if self.shared else 'separate'}-reference"

    def write(self, root: Path, **changes: Any) -> Path:
        """The factored checkpoint; k_proj stays dense where the members are separate."""
        dense = root / self.architecture
        if not dense.exists():
            save_model(self.architecture, dense, **changes)
        reference = root / self.reference
        return write_checkpoint(
            dense,
            root / str(self),
            layout=self.layout,
            shared=self.shared,
            keep_dense=frozenset() if self.shared else frozenset({"k_proj"}),
            reference=None if reference.exists() else reference,
        )

    def __str__(self) -> str:
        return f"{self.architecture}-{self.layout}-{'shared' if self.shared else 'separate'}"


CASES = [
    Case(architecture, layout, shared)
    for architecture in ("llama", "qwen2", "qwen3", "gemma3")
    for shared in (True, False)
    for layout in LAYOUTS
]


def assert_equals_dense(served: Served, reference: Path) -> None:
    """All log probabilities and 64 greedy tokens equal those of transformers."""
    assert served.error == ""
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    for prompt, tokens, logprobs in zip(PROMPTS, served.tokens, served.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0]
        torch.testing.assert_close(logprobs, logits.log_softmax(-1), atol=TOLERANCE, rtol=0)
        assert tokens == logits[len(prompt) - 1 :].argmax(-1).tolist()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Served]]:
    """Every case and every reference, served in one process with no flag of ours."""
    root = tmp_path_factory.mktemp("models")
    for case in CASES:
        case.write(root)
    names = [*map(str, CASES), *dict.fromkeys(case.reference for case in CASES)]
    results = run(root / "run", [{"model": str(root / name)} for name in names], PROMPTS)
    return root, dict(zip(names, results, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_multiplied_out_model(
    case: Case, engines: tuple[Path, dict[str, Served]]
) -> None:
    root, served = engines
    compressed, dense = served[str(case)], served[case.reference]
    assert_equals_dense(compressed, root / case.reference)
    assert compressed.tokens == dense.tokens
    for ours, theirs in zip(compressed.logprobs, dense.logprobs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_group_is_served_low_rank(
    case: Case, engines: tuple[Path, dict[str, Served]]
) -> None:
    _, served = engines
    (report,) = served[str(case)].reports
    assert report is not None
    assert report["layers"] == 3 * 4
    stored = report["stored"]
    assert 0 < stored["lowrank"] + stored["dense"] < stored["dense_equivalent"]
    (dense,) = served[case.reference].reports
    assert dense is not None
    assert dense["layers"] == 0
    assert dense["seconds"] > 0
    assert dense["stored"]["dense"] == dense["stored"]["dense_equivalent"]
    assert dense["stored"]["dense_equivalent"] == stored["dense_equivalent"]


def test_two_ranks_with_biases_and_replicated_heads(tmp_path: Path) -> None:
    """One key-value head on two ranks, and biases on row-parallel layers too."""
    cases = [Case("llama", "interpolative", True), Case("llama", "pair", False)]
    changes = {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
    models = [case.write(tmp_path, **changes) for case in cases]
    arguments = [{"model": str(model), "tensor_parallel_size": 2} for model in models]
    for case, served in zip(cases, run(tmp_path / "run", arguments, PROMPTS), strict=True):
        assert_equals_dense(served, tmp_path / case.reference)
        assert len(served.reports) == 2


def test_compiled(tmp_path: Path) -> None:
    """vLLM's default mode, torch.compile."""
    case = Case("qwen2", "interpolative", True)
    arguments = {"model": str(case.write(tmp_path)), "enforce_eager": False}
    (served,) = run(tmp_path / "run", [arguments], PROMPTS)
    assert_equals_dense(served, tmp_path / case.reference)


@pytest.mark.skipif(bool(unsupported()), reason=str(unsupported()))
def test_fused_kernel_rounds_no_worse_than_the_dense_product(tmp_path: Path) -> None:
    """In bfloat16 both are judged by the same factors in float32, in transformers."""
    cases = [Case("llama", "pair", False), Case("qwen2", "interpolative", True)]
    models = [case.write(tmp_path, dtype=torch.bfloat16) for case in cases]
    references = [tmp_path / case.reference for case in cases]
    eager = [{"model": str(path), "dtype": "bfloat16"} for path in (*models, *references)]
    compiled = {**eager[1], "enforce_eager": False}
    prompt = random_tokens(1, 60, seed=1)[0].tolist()
    *fused, dense_a, dense_b, fused_compiled = run(tmp_path / "run", [*eager, compiled], [prompt])
    judged = [*zip(models, fused, (dense_a, dense_b), strict=True)]
    for path, served, dense in (*judged, (models[1], fused_compiled, dense_b)):
        assert served.error == dense.error == ""
        assert served.reports[0] is not None
        assert served.reports[0]["fused"] >= 3 * 4
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        ours, theirs = (
            (found.logprobs[0][: len(prompt) - 1] - expected).square().mean().sqrt()
            for found in (served, dense)
        )
        assert ours <= 1.5 * theirs


def test_four_ranks(tmp_path: Path) -> None:
    """One key-value head for each rank; every rank loads its own slices only."""
    case = Case("llama", "interpolative", True)
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    arguments = {"model": str(case.write(tmp_path, **changes)), "tensor_parallel_size": 4}
    (served,) = run(tmp_path / "run", [arguments], PROMPTS)
    assert_equals_dense(served, tmp_path / case.reference)
    assert [report["layers"] for report in served.reports if report is not None] == [16] * 4


def test_triton_kernels_in_the_interpreter(tmp_path: Path) -> None:
    """What a GPU would run, on CPU: the same layers, one operation for all parts where it can."""
    pytest.importorskip("triton")
    cases = [Case("llama", "interpolative", True), Case("qwen2", "interpolative", False)]
    models = [{"model": str(case.write(tmp_path))} for case in cases]
    environment = {"TRITON_INTERPRET": "1", "SVDSERVE_KERNEL": "triton"}
    found = run(tmp_path / "run", models, PROMPTS, **environment)
    # Of a block: four groups; or q and v beside a dense k, o, gate and up at once, and down.
    for case, served, fused in zip(cases, found, (4, 5), strict=True):
        assert_equals_dense(served, tmp_path / case.reference)
        assert served.reports[0] is not None
        assert served.reports[0]["fused"] == 3 * fused
