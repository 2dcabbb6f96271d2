"""Where the time of a step goes, dense and compressed, and what perfect products would gain.

    python benchmarks/serving/serving_profile.py [DENSE SMALL ...]

The models are those of serving_1b.py unless others are named. Every engine records the operations
of the same workloads in turn, A B C, C B A, ..., and the median of the rounds is reported.
`allowed` is the ratio to dense that would result if the compressed model's products took exactly
their share of the dense model's time, and everything else the time that it takes. It is no upper
bound, because the fused kernel may take less than its share. The kernel's time includes an MLP's
activation.
"""

import argparse
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

from serving_1b import KEEPS

from svdserve.bench.engine import BenchOptions, start_engines, turns
from svdserve.bench.ratios import ModelWork, model_work
from svdserve.bench.worker import TOTAL
from svdserve.compression.system.files import write_results
from svdserve.compression.system.machine import this_machine

PRODUCTS = ("svdserve::lowrank", "_C::onednn_mm")
ATTENTION = ("_C::cpu_attention_with_kv_cache",)
OUTSIDE = "outside of operations"


def parts(recorded: dict[str, float]) -> dict[str, float]:
    """Seconds of products (linears and head), attention, other operations, and between them."""
    total = recorded.pop(TOTAL)
    products = sum(recorded.get(name, 0.0) for name in PRODUCTS)
    attention = sum(recorded.get(name, 0.0) for name in ATTENTION)
    operations = sum(recorded.values())
    return {
        TOTAL: total,
        "products": products,
        "attention": attention,
        "other operations": operations - products - attention,
        OUTSIDE: total - operations,
    }


def multiplied(work: ModelWork, workload: str) -> int:
    """Parameters of a workload's products; prefill leaves out the head, which sees one token."""
    head = work.head_parameters if workload.startswith("decode") else 0
    return work.linear_parameters + head


Rounds = dict[tuple[str, str], list[dict[str, float]]]  # by workload and model


def record(options: BenchOptions) -> Rounds:
    """The seconds of every counted round, by workload and model."""
    rounds: Rounds = {}
    names = [contender.name for contender in options.contenders]
    with start_engines(options) as engines:
        members = list(zip(engines, names, strict=True))
        for counts, workload, call, (engine, name) in turns(members, options):
            recorded = call["method"]
            once = {"repeats": 1} if recorded == "prefill" else {}
            found = parts(engine.call({**call, **once, "method": "profile", "recorded": recorded}))
            if counts:
                rounds.setdefault((workload, name), []).append(found)
    return rounds


def compared(dense: list[dict[str, float]], own: list[dict[str, float]], share: float) -> Any:
    """Median seconds of a model, its ratio to dense, and the ratio `allowed`."""
    pairs = list(zip(dense, own, strict=True))
    allowed = [
        theirs[TOTAL] / (mine[TOTAL] - mine["products"] + share * theirs["products"])
        for theirs, mine in pairs
    ]
    return {
        "seconds": {part: statistics.median(one[part] for one in own) for part in own[0]},
        "over_dense": statistics.median(theirs[TOTAL] / mine[TOTAL] for theirs, mine in pairs),
        "allowed": statistics.median(allowed),
        "share_of_products": share,
    }


def main() -> None:
    """Record, print and write the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", help="the dense one first")
    parser.add_argument("--json", type=Path, default=Path("results/serving_profile.json"))
    parser.add_argument("--pairs", type=int, default=5, help="rounds; one more warms up")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="compiled mode; operations that Inductor fuses count as outside of operations",
    )
    given = parser.parse_args()
    folder = Path("work/serving_1b")
    directories = given.models or [folder / "dense", *(folder / f"keep-{k:g}" for k in KEEPS)]
    dense, *small = directories
    options = BenchOptions(
        dense=dense,
        models=tuple(small),
        pairs=given.pairs,
        batch_sizes=(8, 32),
        output_len=17,  # every step adds a thousand records
        dtype="bfloat16",
        eager=not given.compiled,
        kv_cache_bytes=256 << 20,
    )
    rounds = record(options)
    work = {one.name: model_work(one.directory) for one in options.contenders}
    first, *_ = work  # the dense model, as vLLM has it
    workloads: dict[str, dict[str, Any]] = {}
    for workload, name in product(options.workloads, work):
        own = rounds[workload, name]
        share = multiplied(work[name], workload) / multiplied(work[first], workload)
        found = compared(rounds[workload, first], own, share)
        workloads.setdefault(workload, {})[name] = found
        print(workload, name, {part: f"{s:.3f}" for part, s in found["seconds"].items()})
        print(f"    over dense {found['over_dense']:.3f}, allowed {found['allowed']:.3f}")
    written = {
        "command": " ".join(["python", *sys.argv]),
        "machine": this_machine().model_dump(mode="json"),
        "options": options.model_dump(mode="json"),
        "workloads": workloads,
    }
    write_results(given.json, written)


if __name__ == "__main__":
    main()
