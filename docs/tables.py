"""This script writes the tables of the pages here and of the README, and the picture of speed.

It reads results/*.json, and the rules of Prometheus for the table of the alerts.

python docs/tables.py            # writes the tables and the picture
python docs/tables.py --check    # ends with exit code 1 if a table is out of date
"""

import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from svdserve.bench.contenders import Contender
from svdserve.bench.engine import BenchResult, ModelResult, plot_bench
from svdserve.compression.evaluation.compare import Comparison, markdown
from svdserve.server.worker import LOAD_FORMAT

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "results"
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def comparison(name: str) -> str:
    """Return the table that `svdserve compare` printed."""
    return markdown(Comparison.model_validate(_read(name)))


def speed(file: str) -> str:
    """Compare speeds with the dense model: median, range, and bytes or operations ratio."""
    result = BenchResult.model_validate(_read(file)["result"])
    workloads, dense = result.options.workloads, result.models[0]
    labels = [
        w.replace("decode_", "decode, batch ").replace("prefill_", "prefill of ") for w in workloads
    ]
    rows = [[*_sizes(dense), *["1"] * len(workloads)]]
    for model in result.compared:
        cells = [
            f"{r.median:.2f} ({r.lowest:.2f}–{r.highest:.2f}; {r.limited_by} {r.work_ratio:.2f})"
            for r in result.over_dense(model)
        ]
        rows.append([*_sizes(model), *cells])
    return _table(["model", "weights, MiB", "worker memory, MiB", *labels], rows)


def _sizes(model: ModelResult) -> list[str]:
    amounts = (model.stored_bytes, model.resident_bytes)
    return [f"`{model.name}`", *(f"{size / 2**20:,.0f}" for size in amounts)]


def profile(file: str) -> str:
    """Say where the time of a step goes, in seconds, and what the machine allows."""
    rows, found = [], _read(file)
    options = found["options"]
    dense, *small = (Path(directory) for directory in (options["dense"], *options["models"]))
    both = (Contender(dense), Contender(dense, LOAD_FORMAT))  # older files lack the second
    names = [one.name for one in (*both, *map(Contender, small))]
    for workload, models in found["workloads"].items():
        for name, one in ((name, models[name]) for name in names if name in models):
            figures = one["seconds"] | {"over dense": one["over_dense"], "allowed": one["allowed"]}
            cells = (f"{figure:.2f}" for figure in figures.values())
            rows.append([workload.replace("_", " "), f"`{name}`", *cells])
    return _table(["workload", "model", *figures], rows)


def layers() -> str:
    """Divide the time of a layer by that of its two products; show the extremes over κ."""
    rows: list[list[str]] = []
    files = {"kernels_1b": "", "kernels_1b_xeon": "", "kernels_1b_amx": " with AMX"}
    for file, units in files.items():
        found = _read(file)
        processor = found["machine"]["processor"] + units
        names = [layer["name"] for layer in found["options"]["layers"]]
        for count in found["options"]["rows"]:
            cells = []
            for name in names:
                ratios = [
                    one["over_products"]
                    for one in found["results"]
                    if one["rows"] == count and one["layer"]["name"] == name
                ]
                cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
            rows.append([processor, str(count), *cells])
    return _table(["processor", "rows", *(f"`{name}`" for name in names)], rows)


def cost() -> str:
    """Say how much time and memory a compression with the default recipe took."""
    found = _read("compression_cost")
    time, memory = found["time"], found["memory"]
    rows = [
        ["calibration tokens", f"{found['tokens']:,}"],
        ["time, s", f"{time['compress_seconds']:.0f}"],
        ["one pass of the teacher, s", f"{time['teacher_pass_seconds']:.0f}"],
        ["one pass of the student, s", f"{time['student_pass_seconds']:.0f}"],
        ["factorisations, s", f"{time['factorisation_seconds']:.0f}"],
        ["peak memory above Python and torch, MiB", f"{memory['above_bytes'] / 2**20:,.0f}"],
        ["growth of the peak from 8 to 32 blocks", f"{found['depth']['growth']:.1%}"],
    ]
    machine = found["machine"]
    heading = f"{found['model']}, {machine['processor']}, {machine['cores']} cores"
    return _table([heading, ""], rows)


def betas() -> str:
    """Show the perplexity that each rule for β of SAES-SVD gives, and the β that it chose."""
    rows = [
        [
            name,
            "" if one["beta"] is None else f"{one['beta']:.2f}",
            f"{one['perplexity']:.2f} ({one['excess']:.3f})",
        ]
        for name, one in _read("ablation_beta")["results"].items()
        if name != "default"
    ]
    return _table(["model", "mean β of the modules", "wikitext2.valid.txt: ppl (excess)"], rows)


def variants() -> str:
    """Compare the default recipe with one choice changed, and methods with their variants."""
    found = _read("ablation_variants")
    rows = [
        [
            name,
            f"{one['stored_bytes'] / 2**20:,.1f}",
            f"{one['perplexity']:.2f} ({one['excess']:.3f})",
        ]
        for name, one in found["results"].items()
    ]
    return _table(["model", "MiB", f"{found['text']['file']}: ppl (excess)"], rows)


def served() -> str:
    """Compare the perplexity that transformers computes with the one that clients measure."""
    found = _read("served_quality")["mean_loss"]
    rows, dense = [], next(iter(found.values()))
    for name, one in found.items():
        row = [f"`{name}`", f"{one['stored_bytes'] / 2**20:,.1f}"]
        for engine in ("transformers", "served"):
            excess = one[engine] - dense[engine]
            row.append(f"{math.exp(one[engine]):.2f} ({excess:.3f})")
        rows.append(row)
    return _table(["model", "MiB", "transformers: ppl (excess)", "vLLM: ppl (excess)"], rows)


def kills() -> str:
    """Count the commands that were killed, and say what they resumed to."""
    found = _read("reliability_kill")
    rows = []
    for name, one in found["commands"].items():
        again = sum(record["killed"] - 1 for record in one["kills"])
        published = sum(record["published"] for record in one["kills"])
        rows.append(
            [f"`svdserve {name}`", str(len(one["kills"])), str(again), str(published), "yes"]
        )
    headings = ["command", "runs killed", "kills of resumptions", "with the output there already"]
    return _table([*headings, "identical bytes in the end"], rows)


def alerts() -> str:
    """List the conditions of which Prometheus warns."""
    rules = yaml.safe_load((DOCS.parent / "docker/prometheus/rules.yml").read_text())
    rows = [
        [f"`{rule['alert']}`", rule["labels"]["severity"], f"`{rule['expr']}`", rule["for"]]
        for group in rules["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    return _table(["alert", "severity", "if", "for"], rows)


def reliability() -> str:
    """Say what the tests of fuzz, load, soak and faults sent, and what came of it."""
    names = ("fuzz", "load", "soak", "faults")
    fuzz, load, soak, faults = (_read(f"reliability_{name}") for name in names)
    one = load["compressed"]
    ended, killed = faults["sigterm"], faults["engine_killed"]
    growth = one["memory_after"] / one["memory_before"] - 1
    rows = [
        [
            "`reliability_fuzz.py`",
            f"{fuzz['cases']:,} distinct requests, valid and invalid, generated from the server's "
            "OpenAPI document and OpenAI's",
            f"{len(fuzz['failures'])} answered with 5xx or not at all",
        ],
        [
            "`reliability_load.py`",
            f"{load['requests']:,} requests, {load['concurrency']} at a time; a fifth is cut off, "
            "a tenth malformed or too long",
            f"{one['server_errors']} 5xx, {one['unanswered']} unanswered, {one['differing']} of "
            f"{one['compared']} greedy answers other than the idle server's, "
            f"memory {growth:+.1%}",
        ],
        [
            "`reliability_soak.py`",
            f"{soak['minutes']} minutes, {soak['concurrency']} clients, "
            f"{soak['requests']:,} requests",
            f"{soak['server_errors']} 5xx, memory {soak['memory_drift']:+.1%}, "
            f"median latency {soak['latency_drift']:+.1%}",
        ],
        [
            "`reliability_faults.py`",
            f"SIGTERM with {_total(ended, 'in_flight')} streams under way in {len(ended)} rounds",
            f"{_total(ended, 'completed')} ended in full, {_total(ended, 'refused')} later "
            f"requests got 503 and {_total(ended, 'otherwise')} anything else, exit "
            f"{_all(ended, 'exit_code')} after at most {_most(ended, 'exit_seconds')} s",
        ],
        [
            "`reliability_faults.py`",
            f"the engine killed with {_total(killed, 'in_flight')} streams under way in "
            f"{len(killed)} rounds",
            f"`/health` says 503 after at most {_most(killed, 'first_503_seconds')} s, exit "
            f"{_all(killed, 'exit_code')} after at most {_most(killed, 'exit_seconds')} s, the "
            "next server answers",
        ],
    ]
    return _table(["benchmark", "what is sent", "what came of it"], rows)


def _total(rounds: list[dict[str, Any]], key: str) -> int:
    return sum(one[key] for one in rounds)


def _most(rounds: list[dict[str, Any]], key: str) -> float:
    return max(one[key] for one in rounds)


def _all(rounds: list[dict[str, Any]], key: str) -> str:
    """Join the values of all rounds, each once."""
    return ", ".join(map(str, sorted({one[key] for one in rounds})))


TABLES = {
    "quality": partial(comparison, "comparison_smollm2"),
    "lower": partial(comparison, "comparison_smollm2_keep06"),
    "methods": partial(comparison, "methods_smollm2"),
    "gemma": partial(comparison, "gemma3_270m"),
    "int8": partial(comparison, "int8_smollm2"),
    "curve": partial(comparison, "curve_smollm2"),
    "speed": partial(speed, "serving_1b"),
    "xeon": partial(speed, "serving_1b_xeon"),
    "epyc": partial(speed, "serving_1b_epyc"),
    "small": partial(speed, "serving_smollm2"),
    "compiled": partial(speed, "serving_1b_compiled"),
    "profile": partial(profile, "serving_profile"),
    "layers": layers,
    "beta": betas,
    "variants": variants,
    "cost": cost,
    "served": served,
    "kills": kills,
    "reliability": reliability,
    "alerts": alerts,
}


def picture() -> None:
    """Draw the speeds of the 1B shape over the dense model, beside the work ratios."""
    plot_bench(
        BenchResult.model_validate(_read("serving_1b")["result"]), DOCS / "images" / "speed.svg"
    )


def filled(text: str) -> str:
    """Return a page whose tables show what the results hold now."""
    return _PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + found[4], text)


def main() -> None:
    """Write the tables and the picture, or check the tables if ``--check`` is given."""
    check, stale = "--check" in sys.argv, []
    for page in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))):
        text = page.read_text()
        if (now := filled(text)) != text:
            stale.append(page.name)
            if not check:
                page.write_text(now)
    if not check:
        picture()
    elif stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python docs/tables.py")


if __name__ == "__main__":
    main()
