"""What low rank can gain on GPUs, by arithmetic: ``python benchmarks/roofline.py``.

This is a PREDICTION, not a measurement: nothing runs. Every product takes the longer of two times,
its bytes over the memory bandwidth and its operations over the peak of the tensor cores. Every
phase costs a fixed time more. A dense layer is one phase; a low-rank layer is two, shrink and
expand, because expand needs all of z. ``svdserve bench --kernels`` measures the same layers on a
GPU.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from svdserve.compression.format.layouts import INTERPOLATIVE

KEEPS = (0.8, 0.6, 0.4)
DECODE_ROWS = (1, 8, 32)
PREFILL_ROWS = (512, 4096)
ROWS = (*DECODE_ROWS, *PREFILL_ROWS)
ROW_TITLES = " | ".join("1 row" if rows == 1 else f"{rows} rows" for rows in ROWS)
ITEM = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Gpu:
    """The peaks of one GPU by its data sheet, for dense bfloat16 on tensor cores."""

    name: str
    bytes_per_second: float
    operations_per_second: float
    source: str


GPUS = (
    Gpu("H100 SXM", 3.35e12, 989.4e12, "NVIDIA H100 Tensor Core GPU datasheet, SXM5 80 GB"),
    Gpu("A100 SXM", 2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU datasheet, SXM 80 GB"),
)


@dataclass(frozen=True)
class Layer:
    """One matrix product of a block [outputs, inputs]; ``sharded`` by tensor parallelism."""

    name: str
    outputs: int
    inputs: int
    sharded: str


@dataclass(frozen=True)
class Model:
    """A Llama shape; the block's linears as vLLM merges them."""

    name: str
    hidden: int
    blocks: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128

    def layers(self) -> tuple[Layer, ...]:
        attention = self.heads * self.head_dim
        qkv = attention + 2 * self.kv_heads * self.head_dim
        return (
            Layer("qkv_proj", qkv, self.hidden, "outputs"),
            Layer("o_proj", self.hidden, attention, "inputs"),
            Layer("gate_up_proj", 2 * self.intermediate, self.hidden, "outputs"),
            Layer("down_proj", self.hidden, self.intermediate, "inputs"),
        )


MODELS = (
    Model("Llama-3-8B", 4096, 32, 14336, 32, 8, 128_256),
    Model("Llama-3-70B", 8192, 80, 28672, 64, 8, 128_256),
)
# Numbers of GPUs (TP ranks): one for the 8B model; one and eight for the 70B model, which does not
# fit one GPU.
PARALLEL = {"Llama-3-8B": (1,), "Llama-3-70B": (1, 8)}


@dataclass(frozen=True)
class Product:
    """[rows, inputs] times [inputs, outputs], on one GPU."""

    outputs: int
    inputs: int

    def bytes(self, rows: int) -> int:
        return ITEM * (self.outputs * self.inputs + rows * (self.outputs + self.inputs))

    def operations(self, rows: int) -> int:
        return 2 * rows * self.outputs * self.inputs

    def seconds(self, rows: int, gpu: Gpu) -> float:
        return max(
            self.bytes(rows) / gpu.bytes_per_second,
            self.operations(rows) / gpu.operations_per_second,
        )


def products(layer: Layer, rank: int | None, gpus: int) -> tuple[Product, ...]:
    """The products that one of ``gpus`` GPUs computes: one if ``rank`` is None (dense), else two.

    If the layer is sharded by outputs, every GPU needs all of z and so all of factor_in. If it is
    sharded by inputs, every GPU computes all of y from the summed z and so holds all of factor_out.
    """
    m, n = layer.outputs, layer.inputs
    by_outputs = layer.sharded == "outputs"
    if rank is None:
        return (Product(m // gpus, n) if by_outputs else Product(m, n // gpus),)
    if by_outputs:
        return Product(rank, n - rank), Product(m // gpus, rank)
    return Product(rank, (n - rank) // gpus), Product(m, rank)


@dataclass(frozen=True)
class Prediction:
    """One layer at one number of rows.

    Attributes:
        dense_bytes, lowrank_bytes: that one GPU reads and writes.
        dense_operations, lowrank_operations: of one GPU.
        launches: of the low-rank layer; a dense layer is one launch.
        bound: dense over low-rank seconds, from bytes and operations alone.
        gain: the same ratio with the fixed time of every phase.
        spare_microseconds: what the second phase may cost before low rank is slower than dense.
    """

    rows: int
    dense_bytes: int
    lowrank_bytes: int
    dense_operations: int
    lowrank_operations: int
    launches: int
    bound: float
    gain: float
    spare_microseconds: float


def predict(layer: Layer, rank: int, gpus: int, rows: int, gpu: Gpu, phase: float) -> Prediction:
    dense, lowrank = products(layer, None, gpus), products(layer, rank, gpus)
    slow, fast = (sum(p.seconds(rows, gpu) for p in some) for some in (dense, lowrank))
    return Prediction(
        rows=rows,
        dense_bytes=sum(p.bytes(rows) for p in dense),
        lowrank_bytes=sum(p.bytes(rows) for p in lowrank),
        dense_operations=sum(p.operations(rows) for p in dense),
        lowrank_operations=sum(p.operations(rows) for p in lowrank),
        launches=1 if rows <= 64 and (gpus == 1 or layer.sharded == "outputs") else 2,
        bound=slow / fast,
        gain=(slow + phase) / (fast + 2 * phase),
        spare_microseconds=(slow - fast) * 1e6,
    )


def model_gain(model: Model, keep: float, gpus: int, rows: int, gpu: Gpu, phase: float) -> float:
    """The gain of a step: of its layers (dense if low rank loses at one row) and the output head.

    Attention, norms and communication are left out, so a real step gains less.
    """
    head = Product(model.vocabulary // gpus, model.hidden)
    heads = head.seconds(rows if rows in DECODE_ROWS else 1, gpu) + phase
    slow = fast = heads / model.blocks
    for layer in model.layers():
        dense = sum(p.seconds(rows, gpu) for p in products(layer, None, gpus)) + phase
        rank = INTERPOLATIVE.rank_for_keep(layer.outputs, layer.inputs, keep)
        slow += dense
        if rank is None or predict(layer, rank, gpus, 1, gpu, phase).gain < 1:
            fast += dense
        else:
            fast += sum(p.seconds(rows, gpu) + phase for p in products(layer, rank, gpus))
    return slow / fast


def report(phase: float) -> dict[str, object]:
    """All predictions, as the JSON file has them."""
    layers, models = [], []
    for gpu in GPUS:
        for model in MODELS:
            for gpus in PARALLEL[model.name]:
                for keep in KEEPS:
                    case = {"gpu": gpu.name, "model": model.name, "gpus": gpus, "keep": keep}
                    gains = {r: model_gain(model, keep, gpus, r, gpu, phase) for r in ROWS}
                    models.append(case | {"gain": gains})
                    for layer in model.layers():
                        rank = INTERPOLATIVE.rank_for_keep(layer.outputs, layer.inputs, keep)
                        assert rank is not None
                        rows = [predict(layer, rank, gpus, r, gpu, phase) for r in ROWS]
                        shape = asdict(layer) | {"rank": rank, "dense": rows[0].gain < 1}
                        layers.append(case | shape | {"rows": [asdict(one) for one in rows]})
    return {
        "prediction": "arithmetic only; nothing was measured",
        "gpus": [asdict(gpu) for gpu in GPUS],
        "phase_seconds": phase,
        "models": models,
        "layers": layers,
    }


def markdown(found: dict[str, object]) -> str:
    """The page docs/roofline.md."""
    phase = float(found["phase_seconds"]) * 1e6  # type: ignore[arg-type]
    lines = [
        "# Roofline of the low-rank layers on GPUs",
        "",
        "**This is a prediction, not a measurement.** No GPU was available. `python "
        "benchmarks/roofline.py` computes this page and "
        "[results/roofline.json](../results/roofline.json), which also has bytes and operations of "
        "every layer; `svdserve bench --kernels` measures the layers on any device.",
        "",
        "- A product takes the longer of two times, bytes over bandwidth and operations over peak, "
        "with the peaks of the data sheets: "
        + "; ".join(
            f"{gpu.name} {gpu.bytes_per_second / 1e12:g} TB/s and "
            f"{gpu.operations_per_second / 1e12:g} TFLOP/s bfloat16 ({gpu.source})"
            for gpu in GPUS
        )
        + ". Real kernels, dense ones too, reach less; a ratio is wrong only if they differ in it.",
        f"- Every phase costs {phase:g} µs more, an assumption (`--phase-us`) for filling and "
        "draining the GPU. A dense layer is one phase and one launch. A low-rank layer is two "
        "phases, in one launch up to 64 rows and in two launches above.",
        "- *Spare* is what the second phase may cost before low rank is slower than dense: compare "
        "it with a measured launch.",
        "- Layouts are `interpolative` and `shared`; ranks are those of `rank_for_keep`, not "
        "rounded.",
        "",
        "## Whole step",
        "",
        "The table has the gain over the linears of all blocks and the output head; layers that "
        "lose at one row stay dense. Attention, norms and communication are left out; they would "
        "lower the gain.",
        "",
        "| GPU | model | GPUs | κ | " + ROW_TITLES + " |",
        "|---|---|---|---|" + "---|" * len(ROWS),
    ]
    for one in found["models"]:  # type: ignore[attr-defined]
        gains = " | ".join(f"{gain:.2f}" for gain in one["gain"].values())
        lines.append(f"| {one['gpu']} | {one['model']} | {one['gpus']} | {one['keep']} | {gains} |")
    lines += [
        "",
        "## Layers",
        "",
        "MB and MFLOP are those of one row, dense → low rank, on one GPU. Gains include the fixed "
        "time of the phases; spare is at one row.",
        "",
        "| GPU | model | GPUs | layer | κ | rank | MB | MFLOP | " + ROW_TITLES + " | spare, µs | |",
        "|---|---|---|---|---|---|---|---|" + "---|" * (len(ROWS) + 2),
    ]
    for one in found["layers"]:  # type: ignore[attr-defined]
        first = one["rows"][0]
        size = f"{first['dense_bytes'] / 1e6:.0f} → {first['lowrank_bytes'] / 1e6:.0f}"
        work = f"{first['dense_operations'] / 1e6:.0f} → {first['lowrank_operations'] / 1e6:.0f}"
        gains = " | ".join(f"{row['gain']:.2f}" for row in one["rows"])
        verdict = "**stays dense**" if one["dense"] else ""
        lines.append(
            f"| {one['gpu']} | {one['model']} | {one['gpus']} | {one['name']} "
            f"[{one['outputs']}, {one['inputs']}] | {one['keep']} | {one['rank']} | {size} "
            f"| {work} | {gains} | {first['spare_microseconds']:.1f} | {verdict} |"
        )
    lines += [
        "",
        "On eight GPUs, each GPU reads the whole factor_in of a layer that is sharded by outputs, "
        "and the whole factor_out of one that is sharded by inputs. Its share of a dense weight "
        "shrinks with the number of GPUs, but these do not.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Compute and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("results/roofline.json"))
    parser.add_argument("--markdown", type=Path, default=Path("docs/roofline.md"))
    parser.add_argument("--phase-us", type=float, default=2.0, help="fixed time of a phase")
    arguments = parser.parse_args()
    found = report(arguments.phase_us * 1e-6)
    for path, text in (
        (arguments.json, json.dumps(found, indent=2) + "\n"),
        (arguments.markdown, markdown(found)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
