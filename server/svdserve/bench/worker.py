"""One engine of the benchmark: a child process that measures when its parent tells it to.

``python -m svdserve.bench.worker`` reads one JSON object on each line of standard input, first the
engine's options and then calls, and answers each with one line on standard output. vLLM's own
output goes to standard error. Between calls the process waits in a read and uses no CPU time.
"""

import itertools
import json
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from svdserve.server.worker import EXTENSION, METHOD, WorkerReport

TOTAL = "total"


@dataclass(frozen=True)
class EngineOptions:
    """Options of one engine; lengths are in tokens."""

    directory: str
    load_format: str
    dtype: str
    eager: bool
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int


class Engine:
    """vLLM's own LLM in this process, with prefix caching off and random token ids as prompts."""

    def __init__(self, options: EngineOptions) -> None:
        from vllm import LLM

        start = time.perf_counter()
        self._llm = LLM(
            model=options.directory,
            load_format=options.load_format,
            dtype=options.dtype,
            enforce_eager=options.eager,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            kv_cache_memory_bytes=options.kv_cache_bytes,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            worker_extension_cls=EXTENSION,
        )
        self._start_seconds = time.perf_counter() - start
        self._engine = self._llm.llm_engine
        self._vocabulary = self._llm.model_config.get_vocab_size()
        self._ids = itertools.count()
        self._around: AbstractContextManager[Any] = nullcontext()
        self._seconds = 0.0

    def describe(self) -> dict[str, Any]:
        """Times of start and loading in seconds, and the worker's memory after loading in bytes."""
        report = WorkerReport.model_validate(self._llm.collective_rpc(METHOD)[0])
        return {
            "start_seconds": self._start_seconds,
            "load_seconds": report.load_seconds,
            "resident_bytes": report.resident_bytes(),
            "unique_bytes": report.unique_bytes(),
            "device_bytes": report.device_bytes,
        }

    def decode(self, batch: int, prompt_len: int, output_len: int, seed: int) -> float:
        """Tokens per second of a batch, from its first tokens to its last ones.

        Raises:
            RuntimeError: the prompts did not fit one step, so prefill and decode would mix.
        """
        self._submit(batch, prompt_len, output_len, seed)
        first: list[Any] = []
        while not first:
            first = self._engine.step()
        if len(first) != batch:
            raise RuntimeError(f"only {len(first)} of {batch} prompts fit the first step")
        return batch * (output_len - 1) / self._timed()

    def prefill(self, prompt_len: int, seed: int, repeats: int = 3) -> float:
        """Prompt tokens per second of prompts one by one, each up to its first output token."""
        seconds = 0.0
        for _ in range(repeats):
            self._submit(1, prompt_len, 1, seed)
            seconds += self._timed()
        return repeats * prompt_len / seconds

    def profile(self, recorded: str, **arguments: Any) -> dict[str, float]:
        """Seconds of a decode or prefill measurement: in total, and of every torch operation.

        An operation's seconds exclude those of the operations that it calls. Recording costs a
        little time.

        Args:
            recorded: ``decode`` or ``prefill``.
            arguments: for that method.
        """
        from torch.profiler import profile

        self._around = recorder = profile()
        getattr(self, recorded)(**arguments)
        self._around = nullcontext()
        found = {event.key: event.self_cpu_time_total / 1e6 for event in recorder.key_averages()}
        return found | {TOTAL: self._seconds}

    def _timed(self) -> float:
        """Seconds until every request is answered."""
        with self._around:
            start = time.perf_counter()
            while self._engine.has_unfinished_requests():
                self._engine.step()
            self._seconds = time.perf_counter() - start
        return self._seconds

    def _submit(self, batch: int, prompt_len: int, output_len: int, seed: int) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False
        )
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(self._vocabulary, (batch, prompt_len), generator=generator)
        for prompt in prompts.tolist():
            request = {"prompt_token_ids": prompt}
            self._engine.add_request(str(next(self._ids)), request, parameters)


def main() -> None:
    """Answer the parent's calls until it closes standard input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = Engine(EngineOptions(**json.loads(sys.stdin.readline())))
    print(json.dumps(engine.describe()), file=answers)
    for line in sys.stdin:
        call = json.loads(line)
        print(json.dumps(getattr(engine, call.pop("method"))(**call)), file=answers)


if __name__ == "__main__":
    main()
