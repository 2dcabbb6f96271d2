"""Speed and quality of svdserve beside the reference code of Swift-SVD or SVD-LLM.

    python benchmarks/compression_reference.py svd-llm --clone DIR --model DIR \
        --calibration FILE --text FILE --work DIR --json results/compression_reference.json

The reference and ``svdserve compress`` factor the same model on the same token ids at the same
keep ratio with the same threads, each in a process of its own, in turn. A process is timed from
its start to the end of its stage: svdserve's up to the finished checkpoint, the reference's
without writing its result (reference_stages.py says how it is run). The perplexity of both results
and of the dense model is measured on the same text; the reference's result has dense weights. A
third process, ``bare``, does only the arithmetic that every such stage needs, in plain torch, so
the reference's time over its time is the largest speed-up that any code could reach. One file holds
the results of several references.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from reference_stages import ADAPTED
from safetensors.torch import save_file

from svdserve.compression.evaluation.perplexity import perplexity
from svdserve.compression.format.integrity import file_sha256
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.pipeline.calibration.tokens import calibration_tokens
from svdserve.compression.pipeline.recipe import Recipe, dump_recipe, load_recipe, make_recipe
from svdserve.compression.system.files import write_results

BAR = 3.0
OURS, REFERENCE, BARE = "svdserve", "reference", "bare"


def timed(command: list[str], threads: int) -> dict[str, float]:
    """Wall and processor seconds of a process, from its start to the end of its stage."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    wall = time.time() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    last = done.stdout.rstrip().rpartition("\n")[2]
    if last.startswith("{"):  # the reference prints when its stage ended
        told = json.loads(last)
        wall, cpu = told["finished"] - started, told["cpu_seconds"]
    return {"seconds": wall, "cpu_seconds": cpu}


def commands(given: argparse.Namespace, recipe: Recipe) -> dict[str, list[str]]:
    """The command of each side; both inputs are written to the work directory."""
    given.work.mkdir(parents=True, exist_ok=True)
    tokens, written = given.work / "tokens.safetensors", given.work / "recipe.yaml"
    save_file({"tokens": calibration_tokens(given.model, recipe)}, tokens)
    written.write_text(dump_recipe(recipe))
    compress = ["-m", "svdserve.cli.main", "compress", "--force"]
    places: dict[str, list[str | Path]] = {
        OURS: [*compress, given.model, "--recipe", written, "--out", given.work / OURS]
    }
    for side, name in ((REFERENCE, given.name), (BARE, BARE)):
        places[side] = [
            Path(__file__).with_name("reference_stages.py"),
            *(name, given.clone, given.model, tokens, given.work / name),
            *("--keep", str(recipe.keep), "--dtype", given.dtype),
        ]
    threads = ["--threads", str(given.threads)]
    return {side: [sys.executable, *map(str, a), *threads] for side, a in places.items()}


def over(runs: dict[str, list[dict[str, float]]], side: str) -> dict[str, dict[str, float]]:
    """The reference's seconds over those of a side, in the rounds that they share."""
    pairs = list(zip(runs[REFERENCE], runs[side], strict=True))
    return {key: spread([r[key] / s[key] for r, s in pairs]) for key in ("seconds", "cpu_seconds")}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(ADAPTED))
    for place in ("clone", "model", "calibration", "text", "work", "json"):
        parser.add_argument(f"--{place}", type=Path, required=True)
    parser.add_argument(
        "--recipe", type=Path, default=None, help="svdserve's recipe; `default` if not given"
    )
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--max-chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="bfloat16", help="the dtype of the reference's model")
    given = parser.parse_args()
    fields = {"calibration": str(given.calibration.resolve()), "tokens": given.tokens}
    code = commit(given.clone)
    chosen = load_recipe(given.recipe) if given.recipe else {}
    recipe = make_recipe(**chosen | fields | {"keep": given.keep})
    runs: dict[str, list[dict[str, float]]] = {REFERENCE: [], OURS: [], BARE: []}
    sides = commands(given, recipe)
    for _ in range(given.pairs):
        for side, done in runs.items():
            done.append(timed(sides[side], given.threads))
            print(side, done[-1])
    models = {"dense": given.model, OURS: given.work / OURS, REFERENCE: given.work / given.name}
    read = {
        side: perplexity(directory, given.text, max_chunks=given.max_chunks)
        for side, directory in models.items()
    }
    entry: dict[str, Any] = {
        "model": given.model.name,
        "recipe": recipe.model_dump(mode="json") | {"calibration": given.calibration.name},
        "calibration_sha256": file_sha256(given.calibration),
        "text": given.text.name,
        "text_sha256": read["dense"].text_sha256,
        "chunks": read["dense"].chunks,
        "machine": read["dense"].machine.model_dump() | {"threads": given.threads},
        "reference_commit": code,
        "reference_dtype": given.dtype,
        "adapted": ADAPTED[given.name],
        "runs": runs,
        "ratio": over(runs, OURS),
        "ratio_of_bare": over(runs, BARE),
        "bar": BAR,
        "perplexity": {side: found.perplexity for side, found in read.items()},
    }
    entries = read_json(given.json) if given.json.exists() else {}
    write_results(given.json, entries | {f"{given.name} / {recipe.method}": entry})
    print(
        json.dumps({key: entry[key] for key in ("ratio", "ratio_of_bare", "perplexity")}, indent=2)
    )


def commit(clone: Path) -> str:
    """The commit of a clone; fails at once if the folder is no clone."""
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
