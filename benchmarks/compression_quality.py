"""Perplexity of the default recipe beside SVD-LLM and the dense model, from one run.

    python benchmarks/compression_quality.py --model DIR --calibration FILE --text FILE \
        --work DIR --json results/quality.json

Finished steps are kept in the work directory, so that a killed run goes on where it stopped.
"""

import argparse
import json
from pathlib import Path

from svdserve.compression.checkpoint import is_checkpoint
from svdserve.compression.evaluate import Perplexity, perplexity
from svdserve.compression.job import compress
from svdserve.compression.recipe import Run, make_recipe

BAR = 0.38
# The reference stores plain pairs of every linear by itself, as the SVD-LLM paper does.
RECIPES: dict[str, dict[str, object]] = {
    "default": {},
    "svd-llm": {"method": "svd-llm", "layout": "pair", "grouping": "separate"},
}


def evaluated(model: Path, text: Path, record: Path, chunks: int | None) -> Perplexity:
    if not record.exists():
        result = perplexity(model, text, max_chunks=chunks)
        record.write_text(result.model_dump_json(indent=2))
    return Perplexity.model_validate_json(record.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--max-chunks", type=int, default=None)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    dense = evaluated(given.model, given.text, given.work / "dense.json", given.max_chunks)
    rows = {"dense": {"perplexity": dense.perplexity, "excess": 0.0}}
    recipes = {}
    for name, fields in RECIPES.items():
        recipe = make_recipe(
            calibration=str(given.calibration), tokens=given.tokens, keep=given.keep, **fields
        )
        out = given.work / name
        if not is_checkpoint(out):
            compress(str(given.model), out, recipe, Run(resume=True))
        result = evaluated(out, given.text, given.work / f"{name}.json", given.max_chunks)
        rows[name] = {
            "perplexity": result.perplexity,
            "excess": result.mean_loss - dense.mean_loss,
        }
        recipes[name] = recipe.model_dump(mode="json") | {"calibration": given.calibration.name}
    summary = {
        "model": given.model.name,
        "text": given.text.name,
        "text_sha256": dense.text_sha256,
        "chunks": dense.chunks,
        "seq_len": dense.seq_len,
        "dtype": dense.dtype,
        "machine": dense.machine.model_dump(),
        "recipes": recipes,
        "results": rows,
        "excess_ratio": rows["default"]["excess"] / rows["svd-llm"]["excess"],
        "bar": BAR,
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(rows | {"excess_ratio": summary["excess_ratio"]}, indent=2))


if __name__ == "__main__":
    main()
