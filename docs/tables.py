"""The tables of these pages, from results/*.json: no number in them is written by hand.

python docs/tables.py            # write them into the pages
python docs/tables.py --check    # exit code 1 if one is out of date
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "results"
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def quality() -> str:
    """Perplexity of every recipe of the comparisons, and ln ppl − ln ppl of the dense model."""
    rows: dict[tuple[str, float], list[str]] = {}
    headings: list[str] = []
    for file in sorted(RESULTS.glob("comparison_smollm2*.json")):
        found = json.loads(file.read_text())
        dense = found["cells"][0]
        texts = [Path(result["text"]).stem for result in dense["perplexities"]]
        headings = ["model", "κ", "weights, MiB", *(f"{text} (excess)" for text in texts), "from"]
        for cell in found["cells"]:
            values = [
                f"{one['perplexity']:.2f} ({math.log(one['perplexity'] / base['perplexity']):.3f})"
                for one, base in zip(cell["perplexities"], dense["perplexities"], strict=True)
            ]
            size = f"{cell['stored_bytes'] / 2**20:,.0f}"
            row = [f"`{cell['name']}`", f"{cell['keep']:g}", size, *values, file.name]
            rows.setdefault((cell["name"], cell["keep"]), row)
    ordered = sorted(rows.items(), key=lambda item: (-item[0][1], item[0][0] != "dense", item[0]))
    return _table(headings, [row for _, row in ordered])


def speed() -> str:
    """Median and range of the rounds, over the dense model."""
    found = _read("serving_1b")
    result = found["result"]
    models: dict[str, dict[str, str]] = {}
    for ratio in result["ratios"]:
        cell = f"{ratio['median']:.2f} ({ratio['lowest']:.2f}–{ratio['highest']:.2f})"
        name = Path(ratio["directory"]).name
        models.setdefault(name, {})[ratio["workload"]] = cell
    workloads = list(next(iter(models.values())))
    memory = {Path(m["directory"]).name: m["resident_bytes"] for m in result["models"]}
    labels = [
        w.replace("decode_", "decode, batch ").replace("prefill_", "prefill of ") for w in workloads
    ]
    rows = [["`dense`", f"{memory['dense'] / 2**20:,.0f}", *["1"] * len(workloads)]]
    for name, cells in models.items():
        rows.append([f"`{name}`", f"{memory[name] / 2**20:,.0f}", *(cells[w] for w in workloads)])
    return _table(["model", "worker memory, MiB", *labels], rows)


def cost() -> str:
    """What a compression with the default recipe took."""
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


def kills() -> str:
    """What was killed, and what it resumed to."""
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


TABLES = {"quality": quality, "speed": speed, "cost": cost, "kills": kills}


def filled(text: str) -> str:
    """A page with its tables as the results have them now."""
    return _PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + found[4], text)


def main() -> None:
    """Write or check every page."""
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        if (now := filled(text)) != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(now)
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(stale)}; run python docs/tables.py")


if __name__ == "__main__":
    main()
