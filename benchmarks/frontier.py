"""Bytes, served perplexity and speed of low rank, of int8 and int4, and of low rank times int8.

    python benchmarks/frontier.py MODEL --work DIR --text FILE [--text FILE] \\
        --json results/frontier.json --plot docs/images/frontier.svg

All contenders are made from MODEL by this command: int4 by compressed-tensors, int8 and factors by
`svdserve compress`. Perplexity is that of vLLM's log-probabilities on the texts. Speeds are of
`svdserve bench`, in which the dense model also runs with svdserve's kernels. DIR keeps every
finished checkpoint and loss, so that a killed run goes on where it stopped.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from int4 import write_int4
from served_quality import served_losses

from svdserve.bench.engine import BenchOptions, BenchResult, print_bench, run_bench
from svdserve.compression.evaluation.perplexity import text_chunks
from svdserve.compression.evaluation.plots import new_figure, save_figure
from svdserve.compression.format.integrity import file_sha256
from svdserve.compression.format.tensors import TensorFiles
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Recipe, Run, make_recipe
from svdserve.compression.system.files import write_json, write_results
from svdserve.compression.system.machine import this_machine

KEEPS = (0.9, 0.8, 0.6, 0.4)
DENSE = "dense"


def contenders(given: argparse.Namespace) -> dict[str, Path]:
    """The directory of every contender by its name, the dense one first; makes what is missing."""
    work, found = given.work, {DENSE: given.model}
    if given.int4:
        found["int4"] = work / "int4"
        if not found["int4"].exists():
            write_int4(given.model, found["int4"])
    of = partial(
        make_recipe,
        calibration=given.calibration,
        tokens=given.tokens,
        seq_len=given.seq_len,
        gradient_tokens=given.gradient_tokens,
    )
    recipes: dict[str, Recipe] = {"int8": of(keep=1.0, weights="int8")}
    for keep in given.keep:
        recipes[f"keep {keep:g}"] = of(keep=keep)
        recipes[f"keep {keep:g} x int8"] = of(keep=keep, weights="int8")
    run = Run(cache=work / "teacher", resume=True)
    for name, recipe in recipes.items():
        found[name] = work / name.replace(" ", "-")
        compress(str(given.model), found[name], recipe, run)
    return found


def kind(name: str) -> str:
    """What a contender shares with those on its line of the plot."""
    if not name.startswith("keep"):
        return name
    return "low rank x int8" if name.endswith("int8") else "low rank"


def losses(name: str, directory: Path, given: argparse.Namespace) -> dict[str, float]:
    """The served mean loss of a token on each text, in nats; kept in the working folder."""
    lengths = {"seq_len": given.eval_len, "max_chunks": given.max_chunks}
    digests = {text.name: file_sha256(text) for text in given.text}
    key = {"model": TensorFiles(directory).fingerprint, "texts": digests, **lengths}
    record = given.work / f"{name.replace(' ', '-')}.json"
    if record.exists() and (kept := read_json(record)).get("key") == key:
        return dict(kept["losses"])
    texts = {text.name: text_chunks(given.model, text, *lengths.values()) for text in given.text}
    served = served_losses(directory, [chunk.tolist() for one in texts.values() for chunk in one])
    found, start = {}, 0
    for text, chunks in texts.items():
        found[text] = statistics.fmean(served[start : start + len(chunks)])
        start += len(chunks)
    write_json(record, {"key": key, "losses": found})
    return found


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Excess over dense on every text against stored bytes, a line for each kind of weights."""
    dense, *others = rows
    texts = list(dense["losses"])
    every = (figure := new_figure(4.2 * len(texts), 3.8)).subplots(1, len(texts), squeeze=False)[0]
    for axes, text in zip(every, texts, strict=True):
        axes.axhline(0, color="grey", linestyle="--", label=DENSE)
        for label in dict.fromkeys(row["kind"] for row in others):
            mine = sorted((row for row in others if row["kind"] == label), key=lambda r: r["bytes"])
            axes.plot(
                [row["bytes"] / 2**20 for row in mine],
                [row["losses"][text] - dense["losses"][text] for row in mine],
                marker="o",
                label=label,
            )
        axes.set(xlabel="stored weights, MiB", title=text)
    every[0].set_ylabel("served loss over dense, nats")
    every[-1].legend()
    save_figure(figure, file)


def speeds(directories: list[Path], given: argparse.Namespace) -> BenchResult:
    """Tokens per second of all contenders in interleaved rounds."""
    dense, *others = directories
    options = BenchOptions(
        dense=dense,
        models=tuple(others),
        pairs=given.pairs,
        starts=given.starts,
        dtype="bfloat16",
        kv_cache_bytes=128 << 20,
    )
    return run_bench(options)


def main() -> None:
    """Make the contenders, measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a dense model in bfloat16")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--keep", type=float, action="append", help=f"default: {KEEPS}")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--gradient-tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=2048, help="of calibration")
    parser.add_argument("--eval-len", type=int, default=2048, help="tokens of a chunk of a text")
    parser.add_argument("--max-chunks", type=int, default=16, help="of each text")
    parser.add_argument("--no-int4", dest="int4", action="store_false")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("results/frontier.json"))
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    given.keep = given.keep or list(KEEPS)
    if len({text.name for text in given.text}) < len(given.text):
        parser.error("two texts have the same name; give files of different names")
    given.work.mkdir(parents=True, exist_ok=True)
    found = contenders(given)
    rows = [
        {
            "name": name,
            "kind": kind(name),
            "bytes": sum(info.nbytes for info in TensorFiles(directory).info.values()),
            "losses": losses(name, directory, given),
        }
        for name, directory in found.items()
    ]
    result = speeds(list(found.values()), given)
    print_bench(result)
    written = {
        "command": " ".join(["python", *(Path(one).name for one in sys.argv)]),
        "texts": {"chunks": given.max_chunks, "tokens of a chunk": given.eval_len},
        "machine": this_machine().model_dump(mode="json"),
        "rows": rows,
        "bench": result.model_dump(mode="json"),
    }
    write_results(given.json, written)
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
