"""Bytes that tensor parallelism sums over the TP ranks for each token, beside the dense model's.

    python benchmarks/serving/serving_allreduce.py MODEL SMALL [SMALL ...]

Every model generates from one prompt in vLLM's own engine, while TP rank 0 counts the bytes of its
all-reduces. The count is compared with arithmetic: the embedding and every row-parallel layer sum m
numbers, or r numbers if the layer is factored with rank r.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from svdserve.compression.format.reader import is_checkpoint
from svdserve.compression.format.schema import parse_config
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.system.files import write_results
from svdserve.compression.system.machine import this_machine
from svdserve.server.cpu_install import work_around

PROMPT, OUTPUT = 8, 9  # the last token is not fed back, so 16 tokens pass through the model
ROW_PARALLEL = ("self_attn.o_proj", "mlp.down_proj")  # of Llama and its relatives
ITEM = 2  # bytes of a bfloat16


def expected_bytes(directory: Path) -> int:
    """The bytes that the ranks r of the checkpoint's modules make a token sum."""
    config = read_json(directory / "config.json")
    modules = (
        parse_config(config["quantization_config"]).modules if is_checkpoint(directory) else {}
    )
    hidden, total = int(config["hidden_size"]), int(config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        for name in ROW_PARALLEL:
            spec = modules.get(f"model.layers.{layer}.{name}")
            total += hidden if spec is None else spec.rank
    return total * ITEM


def measure(directory: Path, ranks: int) -> dict[str, Any]:
    """Count the bytes of a model in a process of its own."""
    environment = {
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function of this file goes to the workers
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise vLLM needs more cores than TP ranks
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "count.json"
        command = [sys.executable, __file__, str(directory), "--json", str(answer)]
        command += ["--ranks", str(ranks), "--count"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            log = (done.stdout + done.stderr)[-4000:]
            raise RuntimeError(f"{directory} on {ranks} TP ranks:\n{log}")
        measured = read_json(answer)
    return {
        "directory": str(directory),
        "all_reduces_per_step": measured["calls"] / OUTPUT,
        "bytes_per_token": measured["bytes"] / (PROMPT + OUTPUT - 1),
        "expected_bytes_per_token": expected_bytes(directory),
    }


def count(directory: str, ranks: int) -> dict[str, int]:
    """Generate, and return how many all-reduces TP rank 0 took part in and their bytes."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=directory,
        tensor_parallel_size=ranks,
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=32,
        max_num_seqs=1,
        kv_cache_memory_bytes=64 << 20,
    )
    sampling = SamplingParams(max_tokens=OUTPUT, ignore_eos=True, detokenize=False)
    llm.collective_rpc(_watch)
    llm.generate({"prompt_token_ids": list(range(4, 4 + PROMPT))}, sampling, use_tqdm=False)
    found: dict[str, int] = llm.collective_rpc(_watched)[0]
    return found


def _watch(worker: Any) -> None:
    from vllm.distributed.parallel_state import GroupCoordinator

    counted = worker.counted = {"calls": 0, "bytes": 0}
    all_reduce = GroupCoordinator.all_reduce

    def counting(group: Any, tensor: Any) -> Any:
        if group.world_size > 1:
            counted["calls"] += 1
            counted["bytes"] += tensor.nbytes
        return all_reduce(group, tensor)

    GroupCoordinator.all_reduce = counting


def _watched(worker: Any) -> dict[str, int]:
    return dict(worker.counted)


def main() -> int:
    """Measure every model; returns 1 if the engine sums other bytes than the arithmetic says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="the dense one first")
    parser.add_argument("--ranks", type=int, default=2, help="the number of TP ranks")
    parser.add_argument("--json", type=Path, default=Path("results/serving_allreduce.json"))
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work_around()
    if arguments.count:
        write_results(arguments.json, count(str(arguments.models[0]), arguments.ranks))
        return 0
    found = [measure(directory, arguments.ranks) for directory in arguments.models]
    for model in found:
        model["over_dense"] = model["bytes_per_token"] / found[0]["bytes_per_token"]
        print(f"{model['directory']}: {model['bytes_per_token']:,.0f} bytes a token,", end=" ")
        print(f"{model['over_dense']:.3f} of dense; {model['expected_bytes_per_token']:,} expected")
    machine = this_machine().model_dump(mode="json")
    content = {"ranks": arguments.ranks, "dtype": "bfloat16", "machine": machine, "models": found}
    write_results(arguments.json, content)
    wrong = [m for m in found if m["bytes_per_token"] != m["expected_bytes_per_token"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
