"""Decoding of SmolLM2, whose small layers are limited by the overhead of calls.

    python benchmarks/serving/serving_smollm2.py MODEL SMALL

SMALL is MODEL compressed to a keep ratio of 0.8. Both run eager, in interleaved rounds.
"""

import argparse
import sys
from pathlib import Path

from serving_bars import Bar, report

from svdserve.bench.engine import BenchOptions, print_bench, run_bench

LEAST = {1: 1.0, 8: 1.08, 32: 1.08}  # tokens per second over dense, by batch size


def main() -> int:
    """Measure and report; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/smollm2"))
    parser.add_argument("small", type=Path, nargs="?", default=Path("models/small"))
    parser.add_argument("--json", type=Path, default=Path("results/serving_smollm2.json"))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--output-len", type=int, default=128)
    arguments = parser.parse_args()
    result = run_bench(
        BenchOptions(
            dense=arguments.model,
            models=(arguments.small,),
            pairs=arguments.pairs,
            batch_sizes=tuple(LEAST),
            output_len=arguments.output_len,
            dtype="bfloat16",
            kv_cache_bytes=256 << 20,
        )
    )
    print_bench(result)
    ratios = {ratio.workload: ratio for ratio in result.ratios}
    bars = [
        Bar(
            model=arguments.small.name,
            what=f"decode_{batch}",
            measured=ratios[f"decode_{batch}"].median,
            least=least,
        )
        for batch, least in LEAST.items()
    ]
    return report(result, bars, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
