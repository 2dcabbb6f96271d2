"""Run the real vLLM on a list of models, one after the other in one fresh process.

``run`` is called by tests; the module itself is the script of that process.
"""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from svdserve.compression.system.memory import release

NEW_TOKENS = 32
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one interpreter for many engines
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # lets a test send a function to the workers
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Served:
    """What one engine did.

    Attributes:
        tokens: [prompts, 32] greedy continuations.
        logprobs: for each prompt [length - 1 + 32, vocabulary]: of every token but the first; with
            ``top_logprobs`` [32, top], of the likeliest new tokens.
        top_tokens: with ``top_logprobs``, for each prompt [32, top]: which tokens these are.
        reports: svdserve's load report of each worker, as dictionaries; None from a dense model.
        resident_bytes: of the process after the run; of one rank only if there is one.
        error: message of the exception that ended it, else empty.
    """

    tokens: list[list[int]]
    logprobs: list[torch.Tensor]
    top_tokens: list[torch.Tensor]
    reports: list[dict[str, Any] | None]
    resident_bytes: int
    error: str


def run(
    folder: Path,
    engines: list[dict[str, Any]],
    prompts: list[list[int]],
    timeout: float = 600,
    **environment: str,
) -> list[Served]:
    """Start one engine for each dictionary of LLM arguments, generate from all prompts.

    Extra arguments: ``prompts`` are this engine's instead; ``reload`` then makes the workers reload
    their weights in place; ``adapter`` names the directory of a LoRA adapter that every request
    uses; ``top_logprobs`` asks for that
    many, where all of a large vocabulary would be too many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps({"engines": engines, "prompts": prompts}))
    command = [sys.executable, __file__, str(folder)]
    environment = os.environ | ENVIRONMENT | {"VLLM_CACHE_ROOT": str(folder)} | environment
    done = subprocess.run(command, env=environment, timeout=timeout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    served = []
    for index in range(len(engines)):
        facts = json.loads((folder / f"{index}.json").read_text())
        tensors = load_file(folder / f"{index}.safetensors")
        rows = [tensors[f"logprobs.{i}"] for i in range(len(facts["tokens"]))]
        tops = [tensor for name, tensor in sorted(tensors.items()) if name.startswith("top.")]
        served.append(Served(logprobs=rows, top_tokens=tops, **facts))
    return served


class _Rank(ForkServerProcess):
    """A worker of vLLM with the environment of this moment, as a fresh interpreter has it."""

    def __init__(
        self, *, target: Callable[..., None], kwargs: dict[str, Any], **options: Any
    ) -> None:
        import vllm_run  # the fork server does not know this module as __main__

        arguments = (dict(os.environ), target, kwargs)
        super().__init__(target=vllm_run._with_environment, args=arguments, **options)


class _Ranks(ForkServerContext):
    Process = _Rank


def _with_environment(
    environment: dict[str, str], target: Callable[..., None], kwargs: dict[str, Any]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(**kwargs)


def _main(folder: Path) -> None:
    import vllm  # noqa: F401
    from vllm.model_executor.models import registry
    from vllm.v1.engine import core
    from vllm.v1.executor import multiproc_executor

    # Ranks fork from one process that has vLLM, instead of importing it each.
    multiprocessing.set_forkserver_preload(["vllm.v1.executor.multiproc_executor", "vllm_run"])
    multiproc_executor.get_mp_context = _Ranks

    # vLLM looks at every architecture in a fresh process, which imports all of vLLM, lest CUDA
    # starts in this one; there is none.
    if not torch.cuda.is_available():
        registry._run_in_subprocess = lambda inspect: inspect()
    # A collection of all that vLLM imports takes as long as starting an engine, which collects ten
    # times. vLLM freezes what lives when an engine starts, and thaws everything when it ends.
    gc.freeze()
    gc.unfreeze = lambda: None
    core.freeze_gc_heap = lambda: None
    jobs = json.loads((folder / "jobs.json").read_text())
    for index, engine in enumerate(jobs["engines"]):
        facts: dict[str, Any] = {"tokens": [], "reports": [], "resident_bytes": 0, "error": ""}
        tensors: dict[str, torch.Tensor] = {}
        try:
            facts |= _serve(engine, engine.pop("prompts", jobs["prompts"]), tensors)
        except Exception as error:
            facts["error"] = f"{type(error).__name__}: {error}"
        (folder / f"{index}.json").write_text(json.dumps(facts))
        save_file(tensors, folder / f"{index}.safetensors")
        gc.freeze()  # what the engine has imported


def _serve(
    engine: dict[str, Any], prompts: list[list[int]], tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    import vllm_run  # Ray's workers can import it, while __main__ is another script there.

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_logprobs": -1,
        "enable_prefix_caching": False,
        "use_tqdm_on_load": False,
        "num_gpu_blocks_override": 64,  # a small cache: allocating 1 GiB takes seconds
    }
    reload = engine.pop("reload", False)
    top = engine.pop("top_logprobs", None)
    adapter = engine.pop("adapter", None)
    if adapter:
        defaults |= {"enable_lora": True, "max_lora_rank": 8}
    llm = None
    try:
        llm = LLM(**(defaults | engine))
        sampling = SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            logprobs=top or -1,
            prompt_logprobs=None if top else -1,
            detokenize=False,
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        outputs = llm.generate(inputs, sampling, use_tqdm=False, lora_request=lora)
        for index, output in enumerate(outputs):
            if top:
                likeliest = [sorted(row)[:top] for row in output.outputs[0].logprobs]
                tensors[f"top.{index}"] = torch.tensor(likeliest)
                tensors[f"logprobs.{index}"] = torch.tensor(
                    [
                        [row[token].logprob for token in tokens]
                        for row, tokens in zip(output.outputs[0].logprobs, likeliest, strict=True)
                    ]
                )
                continue
            rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            tensors[f"logprobs.{index}"] = torch.tensor(
                [[row[token].logprob for token in range(len(row))] for row in rows]
            )
        if reload:
            llm.collective_rpc("reload_weights")
        gc.collect()
        release()  # as the server's worker does before it reports
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "reports": llm.apply_model(vllm_run._report),
            "resident_bytes": psutil.Process().memory_info().rss,
        }
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _report(model: torch.nn.Module) -> dict[str, Any] | None:
    from dataclasses import asdict

    from vllm import ir
    from vllm.model_executor.layers.linear import LinearBase

    from svdserve.kernels.parts import PreparedFactors
    from svdserve.server.plugin.loader import load_report

    report = load_report(model)
    if report is None:
        return None
    activations = [getattr(module, "act_fn", None) for module in model.modules()]
    return asdict(report) | {
        "fused": sum(isinstance(module, PreparedFactors) for module in model.modules()),
        "joined": sum(isinstance(activation, torch.nn.Identity) for activation in activations),
        "unpacked": sum(
            isinstance(module, LinearBase) and module.weight.numel() > 0
            for module in model.modules()
        ),
        "norms": ir.ops.fused_add_rms_norm.get_priority(),
    }


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
