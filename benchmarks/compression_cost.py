"""What compression costs in time and memory.

    python benchmarks/compression_cost.py --model DIR --calibration FILE \
        --out DIR --json results/compression_cost.json

Time: this process compresses the model, then runs one teacher pass and one student pass of plain
transformers over the same calibration tokens with the same threads and the same dtype (float32).
The ratio is compress / (teacher pass + student pass + factorisations alone). The allocator's
spectra (Cholesky roots and eigenvalues of every module) are factorisations too; the file lists
their time separately. Memory is the peak of this process up to the end of compress, above its
memory after importing torch. Random models of one shape with 8 and 32 blocks, compressed in fresh
processes, show whether the peak depends on the depth.
"""

# ruff: noqa: E402 (the baseline is taken between two imports)
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from svdserve.compression.system.memory import peak_bytes

BASELINE = peak_bytes()

from transformers import AutoModelForCausalLM, LlamaConfig

from svdserve.compression.format.log import LOG_FILE
from svdserve.compression.pipeline.calibration.tokens import calibration_tokens
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Recipe, Run, make_recipe
from svdserve.compression.system.machine import this_machine

TIME_BAR, MEMORY_BAR, DEPTH_BAR = 1.6, 1.3e9, 0.05
DEPTHS = (8, 32)
_PEAK = """
import sys
import torch
from svdserve.compression.system.memory import peak_bytes
baseline = peak_bytes()
from pathlib import Path
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Run, make_recipe
model, out, text, tokens, seq_len = sys.argv[1:]
recipe = make_recipe(calibration=text, tokens=int(tokens), seq_len=int(seq_len))
report = compress(model, Path(out), recipe, Run(progress=False))
print(baseline, report.peak_bytes)
"""


def pass_seconds(directory: Path, tokens: torch.Tensor) -> float:
    """One forward pass of the decoder (no head) over the tokens, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().model
    with torch.inference_mode():
        model(tokens[:1], use_cache=False)  # warm up
        started = time.perf_counter()
        for row in tokens:
            model(row[None], use_cache=False)
    return time.perf_counter() - started


def main_costs(model: Path, out: Path, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Time and memory of compressing ``model``; the passes come last, as they need more memory."""
    started = time.perf_counter()
    report = compress(str(model), out, recipe, Run(force=True))
    total = time.perf_counter() - started
    tokens = calibration_tokens(model, recipe)
    teacher, student = pass_seconds(model, tokens), pass_seconds(out, tokens)
    events = [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]

    def solving(kind: str) -> float:
        return sum(event["solve_seconds"] for event in events if event["event"] == kind)

    spectra, factors = solving("gradients"), solving("group")
    times = {
        "compress_seconds": total,
        "teacher_pass_seconds": teacher,
        "student_pass_seconds": student,
        "factorisation_seconds": factors,
        "spectra_seconds": spectra,
        "ratio": total / (teacher + student + factors + spectra),
        "bar": TIME_BAR,
    }
    memory = {
        "torch_bytes": BASELINE,
        "peak_bytes": report.peak_bytes,
        "above_bytes": report.peak_bytes - BASELINE,
        "bar": MEMORY_BAR,
    }
    return {"time": times, "memory": memory}


def peak(model: Path, text: Path, tokens: int, seq_len: int) -> dict[str, int]:
    """Peak bytes of a fresh process that compresses, and its bytes after importing torch."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(model), f"{folder}/out", str(text), str(tokens), str(seq_len)]
        printed = subprocess.run(
            [sys.executable, "-c", _PEAK, *arguments], check=True, capture_output=True, text=True
        ).stdout
    baseline, highest = map(int, printed.split()[-2:])
    return {"baseline": baseline, "peak": highest, "above": highest - baseline}


def depth_costs(model: Path, text: Path) -> dict[str, object]:
    """Peaks for random models of one shape that differ only in their number of blocks."""
    peaks = {}
    for blocks in DEPTHS:
        with tempfile.TemporaryDirectory() as folder:
            random_model(Path(folder), model, blocks)
            peaks[str(blocks)] = peak(Path(folder), text, tokens=16_384, seq_len=1024)
    few, many = (peaks[str(blocks)]["above"] for blocks in DEPTHS)
    return {"blocks": peaks, "growth": many / few - 1, "bar": DEPTH_BAR}


def random_model(folder: Path, tokenizer_of: Path, blocks: int) -> None:
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_of / name).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the compressed model")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=65_536)
    given = parser.parse_args()
    recipe = make_recipe(calibration=str(given.calibration), tokens=given.tokens)
    # The cheap part comes first, because its result may make the long one unnecessary.
    result: dict[str, object] = {
        "model": given.model.name,
        "tokens": given.tokens,
        "recipe": recipe.model_dump(mode="json") | {"calibration": given.calibration.name},
        "machine": this_machine().model_dump(),
        "depth": depth_costs(given.model, given.calibration),
    }
    write(given.json, result)
    result |= main_costs(given.model, given.out, recipe)
    write(given.json, result)


def write(path: Path, result: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
