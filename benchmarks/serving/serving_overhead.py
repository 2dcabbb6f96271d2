"""What `svdserve serve` costs over plain `vllm serve` of the same directory.

    python benchmarks/serving/serving_overhead.py MODEL

Both servers run at once and are loaded in turn. A bar is for the median over all rounds, workloads
and numbers of clients, because a difference would be in the API process and so the same in all.
"""

import argparse
import statistics
import sys
from pathlib import Path

from serving_bars import Bar, report

from svdserve.bench.launch import SERVE
from svdserve.bench.report import markdown
from svdserve.bench.served import THROUGHPUT, LoadOptions, LoadResult, Target, run_load

PLAIN = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
LEAST_THROUGHPUT = 0.99
MOST_TTFT = 1.01


def over_plain(result: LoadResult, figure: str) -> float:
    """The median ratio of a figure to plain vLLM's, over all measurements."""
    plain, ours = result.servers
    return statistics.median(
        mine / theirs
        for workload in result.options.workloads
        for clients in result.options.concurrency
        for mine, theirs in zip(
            *(server.rounds(workload, clients, figure) for server in (ours, plain)), strict=True
        )
    )


def main() -> int:
    """Measure and report; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/small"))
    parser.add_argument("--json", type=Path, default=Path("results/serving_overhead.json"))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--requests", type=int, default=4, help="of each client in a measurement")
    parser.add_argument("--clients", type=int, action="append", help="1, 8 and 32 when absent")
    parser.add_argument("--max-len", type=int, default=512)
    arguments = parser.parse_args()
    options = LoadOptions(
        pairs=arguments.pairs,
        starts=1,
        concurrency=tuple(arguments.clients or (1, 8, 32)),
        requests=arguments.requests,
        max_len=arguments.max_len,
        dtype="bfloat16",
        kv_cache_bytes=256 << 20,
    )
    targets = [Target("vllm", arguments.model, PLAIN), Target("svdserve", arguments.model, SERVE)]
    result = run_load(targets, options)
    print(markdown(result))
    name = arguments.model.name
    throughput, ttft = (over_plain(result, figure) for figure in (THROUGHPUT, "median_ttft_ms"))
    bars = [
        Bar(model=name, what="tokens/s over plain", measured=throughput, least=LEAST_THROUGHPUT),
        Bar(model=name, what="median TTFT over plain", measured=ttft, most=MOST_TTFT),
    ]
    return report(result, bars, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
