"""Quality of the default recipe and of `best` beside SVD-LLM and the dense model, from one run.

    python benchmarks/compression_quality.py --model DIR --calibration FILE --text FILE \
        --other-text FILE --task FILE --task FILE --work DIR --json results/quality.json

The texts are those of the perplexities: one of the calibration's kind, one of another kind. Every
finished step is kept in the work directory, so that a killed run goes on where it stopped.
"""

import argparse
import json
from pathlib import Path

from svdserve.compression.compare import Cell, Evaluation, compare
from svdserve.compression.recipe import Recipe, load_recipe, make_recipe

# The reference stores a pair of factors of one κ for every linear, as the SVD-LLM paper does.
REFERENCE = {
    "method": "svd-llm",
    "layout": "pair",
    "grouping": "separate",
    "allocator": "uniform",
}
KEEP, LOWER = 0.8, 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", required=True, help="as in `svdserve compress`")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--other-text", type=Path, required=True)
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--limit", type=int, default=None, help="items of each task")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--max-chunks", type=int, default=None)
    given = parser.parse_args()

    def recipe(fields: dict[str, object]) -> Recipe:
        return make_recipe(**fields, calibration=given.calibration, tokens=given.tokens)

    evaluation = Evaluation(
        texts=(given.text, given.other_text),
        tasks=tuple(given.task),
        limit=given.limit,
        max_chunks=given.max_chunks,
    )
    recipes = {
        "default": recipe({}),
        "best": recipe(load_recipe("best")),
        "svd-llm": recipe(REFERENCE),
    }
    first = compare(str(given.model), given.work, recipes, [KEEP], evaluation)
    second = compare(
        str(given.model), given.work, {"default": recipes["default"]}, [LOWER], evaluation
    )
    dense, default, best, reference = first.cells
    lower = second.cells[1]

    def ratio(cell: Cell, text: int) -> float:
        return cell.excess(dense, text) / reference.excess(dense, text)

    bars = {
        "default over svd-llm, excess": (ratio(default, 0), 0.28),
        f"default at {LOWER} over svd-llm at {KEEP}, excess": (ratio(lower, 0), 1.0),
        "best over svd-llm, excess": (ratio(best, 0), 0.15),
        "best over svd-llm, excess on the other text": (ratio(best, 1), 0.2),
    }
    if given.task:
        bars["best over dense, accuracy (at least)"] = (best.accuracy / dense.accuracy, 0.93)
    summary = {
        "model": first.model,
        "bars": {name: {"measured": value, "bar": bar} for name, (value, bar) in bars.items()},
        "cells": [*first.portable()["cells"], second.portable()["cells"][1]],
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary["bars"], indent=2))


if __name__ == "__main__":
    main()
