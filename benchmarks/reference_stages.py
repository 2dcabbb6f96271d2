"""Runs the compression stage of a reference repository, unchanged, on given tokens and on the CPU.

    python benchmarks/reference_stages.py NAME CLONE MODEL TOKENS OUT --keep 0.8

NAME is one of

* ``swift-svd``, with a CLONE of github.com/hiahei/Swift-SVD: ``train_svd.py`` as a program, then
  the function of ``update_svd_weights_end.py`` that replaces the weights.
* ``svd-llm``, with a CLONE of github.com/AIoT-MLSys-Lab/SVD-LLM: ``profle_svdllm`` and
  ``whitening`` of ``SVDLLM.py``.
* ``bare``, which is no reference but only the arithmetic that every stage of SVD-LLM's method
  needs. It shows how much faster than a reference any code could be. CLONE is not read.

No code of the references is copied or edited; ``ADAPTED`` lists what this program replaces in them
from outside. TOKENS is a safetensors file with ``tokens`` [N, L]. OUT becomes a Hugging Face
directory with the approximated weights stored dense. The last line printed is JSON: the time at
which the stage, without writing OUT, was finished (seconds of time.time).
"""

import argparse
import importlib
import json
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ADAPTED = {
    "swift-svd": [
        "model and sums on the CPU instead of CUDA",
        "model in the dtype given instead of float16",
        "data set and tokenizer replaced by the given sequences, in their order",
        "intermediate pickles not written, which saves their time",
        "ranks floor(keep * m * n / (m + n)) of every weight handed to the replacing function; "
        "uniform_rank_allocation.py keeps more than asked where k and v are narrower than q",
    ],
    "svd-llm": [
        "device cpu",
        "model loaded by transformers in the dtype given instead of float16, no LlamaTokenizer",
        "calibration loader replaced by the given sequences, in their order",
        "profle_svdllm instead of profle_svdllm_low_resource: the same sums, but the latter needs "
        "arguments that transformers 5 does not pass to a block",
        "factors multiplied out after the stage; the replaced attention has no grouped queries",
    ],
}
_PARENTS = {"self_attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
_SWIFT = {"q": "query", "k": "key", "v": "value", "o": "output"}


def without_datasets(rows: Callable[[], Any]) -> Any:
    """Replace the package ``datasets``, which both repositories import when they start."""
    module = ModuleType("datasets")
    module.load_dataset = lambda *_args, **_kwargs: rows()  # type: ignore[attr-defined]
    return patch.dict(sys.modules, {"datasets": module})


def rank_of_pair(weight: Tensor, keep: float) -> int:
    """The largest rank r at which r (m + n) parameters are at most ``keep`` of W's [m, n]."""
    m, n = weight.shape
    return int(keep * m * n / (m + n))


def swift_svd(model: Path, tokens: Tensor, keep: float, dtype: str) -> Any:
    """The model with weights V_r V_rᵀ W; V from the Gram matrices of the outputs."""
    count, length = tokens.shape
    sequences = iter(tokens)

    class Tokenizer:
        def __call__(self, _text: str, **_kwargs: Any) -> Any:
            self.input_ids = next(sequences)[None]
            return self

    loader = importlib.import_module("ModelLoader").ModelLoader
    load, zeros = loader.load_model, torch.zeros
    arguments = {"model_name": model, "data_root": ".", "data_name": "WikiText2"}
    arguments |= {"max_samples": count, "seqlen": length}
    argv = ["train_svd.py", *(str(x) for k, v in arguments.items() for x in (f"--{k}", v))]
    with (
        # Only the text's length matters, because the program draws offsets into it.
        without_datasets(lambda: {"train": {"text": [" " * (length + 2)]}}),
        patch.object(os, "system", lambda _command: 0),
        patch.object(sys, "argv", argv),
        patch.object(AutoTokenizer, "from_pretrained", lambda *_args, **_kwargs: Tokenizer()),
        patch.object(torch, "zeros", lambda *shape, **kw: zeros(*shape, **kw | {"device": "cpu"})),
        patch.object(loader, "load_model", lambda name, **_kwargs: load(name, torch_dtype=dtype)),
        patch("pickle.dump", lambda *_args: None),
    ):
        trained = runpy.run_path(str(Path(sys.path[0]) / argv[0]), run_name="__main__")
        module = importlib.import_module("update_svd_weights_end")
    network = loader.load_model(str(model))
    ranks: list[dict[str, int]] = []
    for layer in network.model.layers:
        ranks.append({})
        for parent, names in _PARENTS.items():
            for name in names:
                weight = layer.get_submodule(parent).get_submodule(f"{name}_proj").weight
                ranks[-1][f"{_SWIFT.get(name, name)}_rank"] = rank_of_pair(weight, keep)
    return module.apply_full_svd_redemption(
        network, trained["final_svd_list"], rank_allocation=ranks
    )


def svd_llm(model: Path, tokens: Tensor, keep: float, dtype: str) -> Any:
    """The model whose attention and MLP modules hold the pairs of factors."""
    with without_datasets(dict):
        module = importlib.import_module("SVDLLM")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    rows = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens
    ]
    whiteners = module.profle_svdllm("llama", network, rows, "cpu")
    module.whitening("llama", network, whiteners, keep, "cpu")
    return network


def bare(model: Path, tokens: Tensor, keep: float, dtype: str) -> Any:
    """The arithmetic that every such method needs, without pivots, errors and a checkpoint.

    It is one pass of the dense model, the Gram matrix of every group's inputs (half of it, as it is
    symmetric), and for every weight the whitened product and its left singular vectors.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    sums: dict[torch.nn.Module, Tensor] = {}

    def add(linear: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, 1).float()
        half = x.shape[1] // 2
        if linear not in sums:
            sums[linear] = torch.zeros(x.shape[1], x.shape[1])
        total = sums[linear]
        total[half:] += x[:, half:].T @ x
        total[:half, :half] += x[:, :half].T @ x[:, :half]

    read = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for layer in network.model.layers:
        for name in read:
            layer.get_submodule(name).register_forward_pre_hook(add)
    for row in tokens:
        network.model(row[None])
    for layer in network.model.layers:
        for parent, names in _PARENTS.items():
            module = layer.get_submodule(parent)
            for name in (f"{name}_proj" for name in names):
                linear = module.get_submodule(name)
                gram = sums[module.get_submodule(shared.get(name, name))]
                _truncate(linear.weight, gram, keep)
    return network


def _truncate(weight: Tensor, gram: Tensor, keep: float) -> None:
    """Put U_r U_rᵀ W in the place of W [m, n]; U from the whitened product, as in SVD-LLM."""
    m, n = weight.shape
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(n)
    root = torch.linalg.cholesky(gram.tril() + gram.tril(-1).T)
    product = weight.float() @ root
    rank = rank_of_pair(weight, keep)
    if m <= n:
        left = torch.linalg.eigh(product @ product.T).eigenvectors[:, -rank:]
    else:
        right = torch.linalg.eigh(product.T @ product).eigenvectors[:, -rank:]
        left = torch.linalg.qr(product @ right).Q
    weight.data = (left @ (left.T @ weight.float())).to(weight.dtype)


def dense_of_pairs(network: Any, model: Path) -> Any:
    """A fresh model with the products of the factors that ``svd_llm`` computed."""
    fresh = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    for done, layer in zip(network.model.layers, fresh.model.layers, strict=True):
        for parent, names in _PARENTS.items():
            pairs, linears = done.get_submodule(parent), layer.get_submodule(parent)
            for name in names:
                outer, inner = (getattr(pairs, f"{name}_{side}_proj").weight for side in "uv")
                weight = linears.get_submodule(f"{name}_proj").weight
                weight.data = (outer.float() @ inner.float()).to(weight.dtype)
    return fresh


STAGES = {"swift-svd": swift_svd, "svd-llm": svd_llm, "bare": bare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*STAGES])
    for place in ("clone", "model", "tokens", "out"):
        parser.add_argument(place, type=lambda given: Path(given).resolve())
    parser.add_argument("--keep", type=float, required=True)
    parser.add_argument("--dtype", default="auto", help="`auto` is the model's own dtype")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    tokens = load_file(given.tokens)["tokens"]
    sys.path.insert(0, str(given.clone))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.chdir(folder)  # the references write into the current directory
        network = STAGES[given.name](given.model, tokens, given.keep, given.dtype)
        finished = {"finished": time.time(), "cpu_seconds": time.process_time()}
        if given.name == "svd-llm":
            network = dense_of_pairs(network, given.model)
        network.to(AutoModelForCausalLM.from_pretrained(given.model, dtype="auto").dtype)
        network.save_pretrained(given.out)
        AutoTokenizer.from_pretrained(given.model).save_pretrained(given.out)
    print(json.dumps(finished))


if __name__ == "__main__":
    main()
