"""Throughput of a 1B Llama shape, dense and factored: ``python benchmarks/serving/serving_1b.py``.

Weights are random, since speed and memory do not depend on their values, and the factored models
are written directly in the checkpoint format. The bars are the goals of this project, above all a
share of the ratio of bytes or operations. Eager and compiled mode have a results file each,
relative to the dense model in the same mode.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from serving_bars import Bar, report, share_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from svdserve.bench.engine import BenchOptions, BenchResult, print_bench, run_bench
from svdserve.compression.format.layouts import INTERPOLATIVE
from svdserve.compression.format.legacy import GROUPS, role_of
from svdserve.compression.format.schema import CheckpointConfig, ModuleSpec
from svdserve.compression.format.tensors import SINGLE_FILE

KEEPS = (0.8, 0.6, 0.4)
FILES = {"eager": "serving_1b.json", "compiled": "serving_1b_compiled.json"}
HIDDEN, LAYERS, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 16, 8192, 32, 8, 32_000
HEAD_DIM = HIDDEN // HEADS
# Outputs and inputs of each linear.
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
MODULES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Promise:
    """The least median over dense that a keep ratio must reach."""

    decode_8: float
    prefill_512: float


PROMISES = {0.8: Promise(1.10, 1.18), 0.6: Promise(1.30, 1.5), 0.4: Promise(1.60, 1.8)}
LEAST_DECODE = 1.0  # decoding is not slower than dense at any batch size
LEAST_SHARE = 0.95  # of the bytes ratio in decoding, of the operations ratio in prefill
LEAST_MEMORY = 0.9  # of the bytes that the files save, to be saved in the worker


def write_model(directory: Path, keep: float | None) -> None:
    """Write a random model, dense or with every linear factored to ``keep``, shared by group."""
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        return weight.normal_(std=columns**-0.5, generator=generator)

    tensors = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN)}
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    modules: dict[str, ModuleSpec] = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        if keep is None:
            tensors |= {f"{prefix}.{n}.weight": random(*shape) for n, shape in SHAPES.items()}
            continue
        for name, spec in _specs(prefix, keep):
            modules[name] = spec
            for suffix, shape in spec.tensors().items():
                if suffix == "pivots":
                    order = torch.randperm(spec.in_features, generator=generator)
                    pivots = order[: spec.rank].sort().values
                    tensors[f"{name}.{suffix}"] = pivots.to(torch.int32)
                else:
                    tensors[f"{name}.{suffix}"] = random(*shape)
    config: dict[str, object] = dict(CONFIG)
    if keep is not None:
        block = CheckpointConfig(base_model="random-1b", keep=keep, modules=modules)
        config["quantization_config"] = block.dump()
    directory.mkdir(parents=True)
    save_file(tensors, directory / SINGLE_FILE)
    # The configuration comes last: a directory that has one is complete.
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _specs(prefix: str, keep: float) -> Iterator[tuple[str, ModuleSpec]]:
    for module in MODULES:
        parent, _, group = module.rpartition(".")
        shapes = [SHAPES[f"{parent}.{member}"] for member in GROUPS[group]]
        out, inputs = tuple(rows for rows, _ in shapes), shapes[0][1]
        rank = INTERPOLATIVE.rank_for_keep(sum(out), inputs, keep)
        spec = {"role": role_of(module), "members": GROUPS[group], "layout": "interpolative"}
        sizes = {"rank": rank, "in": inputs, "out": out}
        yield f"{prefix}.{module}", ModuleSpec.model_validate(spec | sizes)


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with one word for each token, because no server starts without one."""
    words = {f"<{number}>": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<0>").save_pretrained(directory)


def bars(result: BenchResult) -> list[Bar]:
    """Every goal with its measurement."""
    dense, *others = result.models
    medians = {(ratio.directory, ratio.workload): ratio.median for ratio in result.ratios}
    found = share_bars(result, LEAST_SHARE)
    for model in others:
        promise = PROMISES[model.facts.keep_ratio]
        least = {name: LEAST_DECODE for name in result.options.workloads if "decode" in name}
        for workload, required in (least | vars(promise)).items():
            if workload in result.options.workloads:
                measured = medians[model.directory, workload]
                found.append(
                    Bar(model=model.name, what=workload, measured=measured, least=required)
                )
        saved = dense.resident_bytes - model.resident_bytes
        share = saved / (dense.stored_bytes - model.stored_bytes)
        found.append(Bar(model=model.name, what="memory saved", measured=share, least=LEAST_MEMORY))
    return found


def main() -> int:
    """Write the models that are missing, measure and report; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder")
    parser.add_argument("--work", type=Path, default=Path("work/serving_1b"), help="models, 6 GiB")
    parser.add_argument("--mode", choices=FILES, action="append", help="both when absent")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of each start")
    parser.add_argument("--starts", type=int, default=1, help="of all engines")
    parser.add_argument("--output-len", type=int, default=64)
    arguments = parser.parse_args()
    dense, *factored = directories = [
        arguments.work / name for name in ("dense", *(f"keep-{keep:g}" for keep in KEEPS))
    ]
    for directory, keep in zip(directories, (None, *KEEPS), strict=True):
        if not (directory / "config.json").exists():
            write_model(directory, keep)
        if not (directory / "tokenizer.json").exists():
            write_tokenizer(directory)
    missed = 0
    for mode in arguments.mode or FILES:
        result = run_bench(
            BenchOptions(
                dense=dense,
                models=tuple(factored),
                pairs=arguments.pairs,
                starts=arguments.starts,
                output_len=arguments.output_len,
                dtype="bfloat16",
                eager=mode == "eager",
                kv_cache_bytes=256 << 20,
            )
        )
        print_bench(result)
        missed |= report(result, bars(result), arguments.results / FILES[mode])
    return missed


if __name__ == "__main__":
    sys.exit(main())
