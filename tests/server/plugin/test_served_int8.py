"""Int8 checkpoints in vLLM, against the arithmetic of its kernels and against transformers.

The kernels round the input of every product to int8, symmetric, with a scale for each token;
transformers rounds the weights only. ``W8A8`` does both in float64, for a tight comparison; the
distance from transformers is what the rounding of activations costs.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from checkpoints import round_rows, write_checkpoint
from models import random_tokens, save_model
from svdserve.compression.format.reader import Checkpoint, open_checkpoint
from svdserve.compression.format.schema import linears_of
from vllm_run import Served, run

pytestmark = pytest.mark.vllm

# Root mean squares of differences of log probabilities, whose own spread is about 1.
# Values near the middle between two integers fall to either side, and three layers spread that.
SAME_ARITHMETIC = 0.015  # measured up to 0.009
ROUNDED_ACTIVATIONS = 0.06  # against transformers; measured 0.02 to 0.04
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 30)]
CASES = {
    "llama-interpolative": ("llama", "interpolative", True, frozenset({"o_proj"})),
    "qwen2-pair": ("qwen2", "pair", False, frozenset({"k_proj", "v_proj", "down_proj"})),
    "qwen3-dense": (
        "qwen3",
        "pair",
        True,
        frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ),
}
OTHERS = [("qwen2-pair", "bfloat16"), ("llama-interpolative", "float16")]


class W8A8(nn.Module):
    """One linear of a checkpoint: weights from its files, every product's input rounded."""

    def __init__(self, checkpoint: Checkpoint, name: str, bias: Tensor | None) -> None:
        super().__init__()
        self.bias, config = bias, checkpoint.config
        self.first: Tensor | None = None
        if name in config.linears:
            tensors = checkpoint.files.load([f"{name}.weight", f"{name}.weight_scale"])
            values, scale = (tensor.double() for tensor in tensors.values())
            self.last = values * scale[:, None]
            return
        module = config.owners[name]
        spec, factors = config.modules[module], checkpoint.factors(module).decoded(torch.float64)
        start = sum(spec.out_features[: linears_of(module, spec).index(name)])
        size = spec.out_features[linears_of(module, spec).index(name)]
        self.first, self.last = factors["factor_in"], factors["factor_out"][start : start + size]
        self.pivots = factors.get("pivots")

    def forward(self, x: Tensor) -> Tensor:
        z = x.double()
        if self.first is not None and self.pivots is None:
            z = rounded(z) @ self.first.T
        elif self.first is not None:
            mine = self.pivots.long()
            rest = [i for i in range(z.shape[-1]) if i not in set(mine.tolist())]
            z = z[..., mine] + rounded(z[..., rest]) @ self.first.T
        y = rounded(z) @ self.last.T
        return (y if self.bias is None else y + self.bias.double()).to(x.dtype)


def rounded(x: Tensor) -> Tensor:
    values, scale = round_rows(x.reshape(-1, x.shape[-1]))
    return (values * scale.double()[:, None]).view(x.shape)


def write(case: str, root: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    architecture, layout, shared, keep_dense = CASES[case]
    dense = save_model(architecture, root / f"{case}-dense", dtype, **changes)
    return write_checkpoint(
        dense, root / case, layout=layout, shared=shared, keep_dense=keep_dense, int8=True
    )


def logprobs(model: nn.Module, served: Served) -> list[Tensor]:
    """Of the same tokens as vLLM's."""
    with torch.no_grad():
        return [
            model(torch.tensor([prompt + tokens[:-1]])).logits[0].log_softmax(-1)
            for prompt, tokens in zip(PROMPTS, served.tokens, strict=True)
        ]


def distance(served: Served, expected: list[Tensor]) -> float:
    difference = torch.cat(served.logprobs) - torch.cat(expected)
    return float(difference.square().mean().sqrt())


def assert_served(served: Served, directory: Path, *, same: bool = True) -> None:
    """Near transformers and, if ``same``, nearer to the arithmetic of the kernels."""
    assert served.error == ""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert distance(served, logprobs(model, served)) < ROUNDED_ACTIVATIONS
    if not same:
        return
    checkpoint = open_checkpoint(directory)
    names = [*checkpoint.config.owners, *checkpoint.config.linears]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        bias = getattr(model.get_submodule(name), "bias", None)
        setattr(model.get_submodule(parent), leaf, W8A8(checkpoint, name, bias))
    assert distance(served, logprobs(model, served)) < SAME_ARITHMETIC


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Served]]:
    """Every case in float32; other dtypes and compiled models run other operations of vLLM."""
    root = tmp_path_factory.mktemp("int8")
    paths = {case: write(case, root) for case in CASES}
    engines = {case: {"model": str(path)} for case, path in paths.items()}
    for case, dtype in OTHERS:
        path = str(paths[case])
        engines[dtype] = {"model": path, "dtype": dtype, "enforce_eager": dtype == "float16"}
    changes = {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
    path = write("llama-interpolative", root / "biases", **changes)
    engines["two ranks"] = {"model": str(path), "tensor_parallel_size": 2}
    served = run(root / "run", list(engines.values()), PROMPTS)
    return root, dict(zip(engines, served, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_is_the_arithmetic_of_int8(case: str, engines: tuple[Path, dict[str, Served]]) -> None:
    root, served = engines
    assert_served(served[case], root / case)


@pytest.mark.parametrize(("case", "dtype"), OTHERS)
def test_other_dtypes(case: str, dtype: str, engines: tuple[Path, dict[str, Served]]) -> None:
    """bfloat16 in vLLM's default mode, torch.compile."""
    root, served = engines
    assert_served(served[dtype], root / case, same=False)


@pytest.mark.parametrize("case", CASES)
def test_bytes_on_the_rank(case: str, engines: tuple[Path, dict[str, Served]]) -> None:
    root, served = engines
    checkpoint = open_checkpoint(root / case)
    (report,) = served[case].reports
    assert report is not None
    pivots = sum(4 * s.rank for s in checkpoint.config.modules.values() if "pivots" in s.tensors())
    stored = checkpoint.stored_bytes()
    assert report["stored"]["lowrank"] == stored["lowrank"] - pivots
    assert report["stored"]["dense"] == stored["dense"]
    assert report["stored"]["dense_equivalent"] == stored["dense_equivalent"]


def test_two_ranks_with_biases_and_replicated_heads(
    engines: tuple[Path, dict[str, Served]],
) -> None:
    """Shards of weights and scales; o_proj is a row-parallel dense int8 layer."""
    root, served = engines
    assert_served(served["two ranks"], root / "biases" / "llama-interpolative", same=False)
    assert len(served["two ranks"].reports) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs", [32, 48, 61])
def test_one_product_by_its_definition(outputs: int, dtype: torch.dtype) -> None:
    """Any number of outputs, strided inputs and tokens of zeros, for every operation of vLLM."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from svdserve.server.plugin.products import Int8Product

    generator = torch.Generator().manual_seed(outputs)
    values, scale = round_rows(torch.randn(outputs, 64, generator=generator))
    bias = nn.Parameter(torch.randn(outputs, generator=generator).to(dtype), requires_grad=False)
    x = torch.randn(5, 80, generator=generator).to(dtype)[:, 16:]
    x[2] = 0
    token = (x.double().abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-30)
    expected = (x.double() / token).round() @ values.double().T * token * scale.double() + bias
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as while vLLM loads a model
    try:
        with set_current_vllm_config(VllmConfig()):
            product = Int8Product(values, scale, dtype, bias)
            y = product(x, bias)
    finally:
        torch.set_default_dtype(default)
    assert product.stored_bytes == outputs * (64 + 4)
    assert y.dtype == dtype
    error = float((y.double() - expected).norm() / expected.norm())
    assert error < 2 * torch.finfo(dtype).eps
