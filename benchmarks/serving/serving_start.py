"""The time from starting a server to its first token, compressed over dense.

    python benchmarks/serving/serving_start.py MODEL SMALL [SMALL ...]

One server runs at a time; they are started in turn, A B C, C B A, ..., all by `svdserve serve`.
The first round, which may read files from disk, does not count.
"""

import argparse
import sys
from pathlib import Path

from serving_bars import Bar, report

from svdserve.bench.report import markdown
from svdserve.bench.served import LoadOptions, run_load, targets_of

MOST = 1.05


def main() -> int:
    """Measure and report; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/smollm2"))
    parser.add_argument("small", type=Path, nargs="*", default=[Path("models/small")])
    parser.add_argument("--json", type=Path, default=Path("results/serving_start.json"))
    parser.add_argument("--starts", type=int, default=7, help="one more warms up")
    arguments = parser.parse_args()
    options = LoadOptions(
        starts=arguments.starts + 1,
        workloads=(),
        concurrency=(8,),
        dtype="bfloat16",
        kv_cache_bytes=256 << 20,
    )
    result = run_load(targets_of(arguments.model, arguments.small, options.dtype), options)
    for server in result.servers:
        del server.ready_seconds[0], server.first_token_seconds[0]
    print(markdown(result))
    bars = [
        Bar(model=ratio.name, what="start over dense", measured=ratio.median, most=MOST)
        for ratio in result.ratios
    ]
    return report(result, bars, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
