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
from svdserve.compression.tasks import TaskScores, task_scores
from svdserve.compression.workdir import save_json

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

    evaluation = Evaluation(texts=(given.text, given.other_text), max_chunks=given.max_chunks)
    # The long one last.
    default, svd_llm = recipe({}), recipe(REFERENCE)
    first = compare(
        str(given.model), given.work, {"default": default, "svd-llm": svd_llm}, [KEEP], evaluation
    )
    second = compare(str(given.model), given.work, {"default": default}, [LOWER], evaluation)
    third = compare(
        str(given.model), given.work, {"best": recipe(load_recipe("best"))}, [KEEP], evaluation
    )
    dense, closed, reference = first.cells
    lower, best = second.cells[1], third.cells[1]

    def ratio(cell: Cell, text: int) -> float:
        return cell.excess(dense, text) / reference.excess(dense, text)

    bars = {
        "default over svd-llm, excess": (ratio(closed, 0), 0.28),
        f"default at {LOWER} over svd-llm at {KEEP}, excess": (ratio(lower, 0), 1.0),
        "best over svd-llm, excess": (ratio(best, 0), 0.15),
        "best over svd-llm, excess on the other text": (ratio(best, 1), 0.2),
    }
    tasks = {}
    if given.task:
        folders = {"dense": given.model, "best": given.work / f"best-keep{KEEP:g}"}
        tasks = {
            name: scores(folder, given.work / f"{name}.tasks.json", given)
            for name, folder in folders.items()
        }
        share = tasks["best"].accuracy / tasks["dense"].accuracy
        bars["best over dense, accuracy (at least)"] = (share, 0.93)
    summary = {
        "model": first.model,
        "bars": {name: {"measured": value, "bar": bar} for name, (value, bar) in bars.items()},
        "cells": [
            *first.portable()["cells"],
            *(found.portable()["cells"][1] for found in (second, third)),
        ],
        "tasks": {
            name: found.model_dump(mode="json", exclude={"model"}) for name, found in tasks.items()
        },
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary["bars"], indent=2))


def scores(model: Path, record: Path, given: argparse.Namespace) -> TaskScores:
    """Measured once, and kept in ``record``."""
    if not record.exists():
        found = task_scores(model, given.task, limit=given.limit)
        save_json(found.model_dump(mode="json"), record)
    return TaskScores.model_validate_json(record.read_text())


if __name__ == "__main__":
    main()
