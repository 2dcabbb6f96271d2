"""The served compressed model equals the dense model that its factors multiply out to.

Two references: that dense model served by vLLM, and the same in transformers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters import write_adapter
from checkpoints import write_checkpoint
from models import random_tokens, save_model
from svdserve.kernels.cpu import unsupported
from vllm_run import Served, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

TOLERANCE = 1e-4  # of a log probability, float32; rounding between the two engines is about 1e-5
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 30)]


@dataclass(frozen=True)
class Case:
    architecture: str
    layout: str
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


# Every two of architecture, layout and grouping meet in one of them.
CASES = [
    Case(architecture, layout, (layout == "interpolative") == fused)
    for architecture, fused in (
        ("llama", True),
        ("qwen2", True),
        ("qwen3", False),
        ("gemma3", False),
    )
    for layout in ("pair", "interpolative")
]


def assert_equals_dense(
    served: Served, reference: Path, prompts: list[list[int]] = PROMPTS
) -> None:
    """All log probabilities and 32 greedy tokens equal those of transformers."""
    assert served.error == ""
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    for prompt, tokens, logprobs in zip(prompts, served.tokens, served.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0]
        torch.testing.assert_close(logprobs, logits.log_softmax(-1), atol=TOLERANCE, rtol=0)
        assert tokens == logits[len(prompt) - 1 :].argmax(-1).tolist()


# Models of other shapes, each in a folder of its own.
BIASES = {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
TWO_RANKS = [Case("llama", "interpolative", True), Case("llama", "pair", False)]
ADAPTED, COMPILED = Case("llama", "interpolative", True), Case("qwen2", "interpolative", True)
# A gated MLP whose gate and up are one part is joined with its activation.
ROUNDED = [
    Case("llama", "pair", False),
    Case("qwen2", "interpolative", True),
    Case("gemma3", "pair", True),
]
LONG = random_tokens(1, 60, seed=1)[0].tolist()


@dataclass(frozen=True)
class Engines:
    """What was served, and where its models lie.

    Attributes:
        adapted: the dense model with the adapter in its weights.
    """

    root: Path
    adapted: Path
    served: dict[str, Served]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Every engine of this file in one process, which imports vLLM once, with no flag of ours."""
    root = tmp_path_factory.mktemp("models")
    wanted: dict[str, dict[str, Any]] = {}
    for case in CASES:
        wanted[str(case)] = {"model": str(case.write(root))}
    for case in CASES:
        wanted[case.reference] = {"model": str(root / case.reference)}
    for case in TWO_RANKS:
        model = str(case.write(root / "biases", **BIASES))
        wanted[f"two-{case}"] = {"model": model, "tensor_parallel_size": 2}
    model = str(TWO_RANKS[0].write(root / "four", **FOUR))
    wanted["four"] = {"model": model, "tensor_parallel_size": 4}
    wanted["compiled"] = {"model": str(root / str(COMPILED)), "enforce_eager": False}
    adapter = root / "adapter"
    adapted = write_adapter(adapter, root / ADAPTED.reference, root / "adapted")
    # Log probabilities of two at once fail in vLLM 0.32, of a dense model too.
    lora = {"model": str(root / str(ADAPTED)), "adapter": str(adapter), "prompts": PROMPTS[:1]}
    wanted["adapted"] = lora
    wanted["adapted-two"] = {**lora, "tensor_parallel_size": 2}
    wanted["adapted-bfloat16"] = {**lora, "dtype": "bfloat16"}
    if not unsupported():
        for case in ROUNDED:
            case.write(root / "rounded", dtype=torch.bfloat16)
            for model in (str(case), case.reference):
                path = str(root / "rounded" / model)
                wanted[f"rounded-{model}"] = {"model": path, "dtype": "bfloat16", "prompts": [LONG]}
        bfloat16 = wanted[f"rounded-{ROUNDED[1]}"]
        wanted["rounded-compiled"] = {**bfloat16, "enforce_eager": False}
        wanted["rounded-two"] = {**bfloat16, "tensor_parallel_size": 2}
    results = run(root / "run", list(wanted.values()), PROMPTS, timeout=1500)
    return Engines(root, adapted, dict(zip(wanted, results, strict=True)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_multiplied_out_model(case: Case, engines: Engines) -> None:
    compressed, dense = engines.served[str(case)], engines.served[case.reference]
    assert_equals_dense(compressed, engines.root / case.reference)
    assert compressed.tokens == dense.tokens
    for ours, theirs in zip(compressed.logprobs, dense.logprobs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_group_is_served_low_rank(case: Case, engines: Engines) -> None:
    (report,) = engines.served[str(case)].reports
    assert report is not None
    assert report["layers"] == 3 * 4
    stored = report["stored"]
    assert 0 < stored["lowrank"] + stored["dense"] < stored["dense_equivalent"]
    (dense,) = engines.served[case.reference].reports
    assert dense is not None
    assert dense["layers"] == 0
    assert dense["seconds"] > 0
    assert dense["stored"]["dense"] == dense["stored"]["dense_equivalent"]
    assert dense["stored"]["dense_equivalent"] == stored["dense_equivalent"]


@pytest.mark.parametrize("case", TWO_RANKS, ids=str)
def test_two_ranks_with_biases_and_replicated_heads(case: Case, engines: Engines) -> None:
    """One key-value head on two ranks, and biases on row-parallel layers too."""
    served = engines.served[f"two-{case}"]
    assert_equals_dense(served, engines.root / "biases" / case.reference)
    assert len(served.reports) == 2
    for report in served.reports:
        assert report is not None
        stored = report["stored"]
        kept = stored["lowrank"] + (0 if case.shared else stored["dense"])
        assert 0 < report["read"] <= 1.1 * kept


def test_four_ranks(engines: Engines) -> None:
    """One key-value head for each rank; every rank loads its own slices only."""
    served = engines.served["four"]
    assert_equals_dense(served, engines.root / "four" / TWO_RANKS[0].reference)
    assert [report["layers"] for report in served.reports if report is not None] == [16] * 4


def test_compiled(engines: Engines) -> None:
    """vLLM's default mode, torch.compile."""
    assert_equals_dense(engines.served["compiled"], engines.root / COMPILED.reference)


@pytest.mark.skipif(bool(unsupported()), reason=str(unsupported()))
@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((str(case), case) for case in ROUNDED),
        ("compiled", ROUNDED[1]),
        ("two", ROUNDED[1]),
    ],
    ids=str,
)
def test_fused_kernel_rounds_no_worse_than_the_dense_product(
    name: str, case: Case, engines: Engines
) -> None:
    """In bfloat16 both are judged by the same factors in float32, in transformers."""
    ours, theirs = (engines.served[f"rounded-{one}"] for one in (name, case.reference))
    assert ours.error == theirs.error == ""
    for report in ours.reports:
        assert report is not None
        assert report["fused"] >= (3 * 4 if len(ours.reports) == 1 else 3 * 2)
        assert report["joined"] == (3 if case.shared else 0)
    path = engines.root / "rounded" / str(case)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([LONG])).logits[0, :-1].log_softmax(-1)
    errors = [
        (found.logprobs[0][: len(LONG) - 1] - expected).square().mean().sqrt()
        for found in (ours, theirs)
    ]
    assert errors[0] <= 1.5 * errors[1]


def test_only_a_compressed_model_in_eager_mode_gets_other_norms(engines: Engines) -> None:
    names = (str(COMPILED), COMPILED.reference, "compiled")
    norms = [r["norms"] for name in names for r in engines.served[name].reports if r]
    assert norms == [["svdserve", "native"], ["native"], ["native"]]


def test_adapters_see_the_layers_of_the_model(engines: Engines) -> None:
    """LoRA on a gated MLP, whose layers would otherwise be reordered and joined.

    On two ranks vLLM sums the base layer's and the adapter's shares together.
    """
    for name in ("adapted", "adapted-two"):
        assert_equals_dense(engines.served[name], engines.adapted, PROMPTS[:1])
    (report,) = engines.served["adapted-bfloat16"].reports
    assert report is not None
    assert report["joined"] == 0


@pytest.mark.exhaustive
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
