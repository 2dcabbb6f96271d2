"""What each choice of the default recipe is worth: compares it with one choice changed at a time.

    python benchmarks/ablation.py --model DIR --calibration FILE --text FILE \
        --work DIR --json results/ablation.json [--only beta --only allocator]

Use a validation text, not a test text. The work directory keeps every finished cell, so that a
killed run goes on where it stopped.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from svdserve.compression.evaluation.compare import (
    Cell,
    checkpoint_of,
    compare,
    markdown,
)
from svdserve.compression.evaluation.inspection import inspect_checkpoint
from svdserve.compression.evaluation.options import Evaluation
from svdserve.compression.pipeline.recipe import make_recipe
from svdserve.compression.system.files import write_json

UNIFORM = {"allocator": "uniform"}
PAPER = UNIFORM | {"layout": "pair", "grouping": "separate"}
RES_SVD = PAPER | {"method": "res-svd"}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "beta": {
        f"beta {beta}": {"parameters": {"beta": beta}}
        for beta in (0.0, 0.5, 0.75, 1.0, "aces", "exact", "held-out")
    },
    # The same without the metric of the outputs, with the error of each module on its own.
    "beta of saes-svd": {
        f"saes-svd beta {beta}": {"method": "saes-svd", "parameters": {"beta": beta}} | UNIFORM
        for beta in ("aces", 0.25, 0.5, 0.75, "exact", "held-out")
    },
    # The first is as in the paper. Then both truncations have one metric, where the residual
    # changes nothing; the two metrics are swapped; and only the last blocks are compressed.
    "res-svd": {
        "res-svd": RES_SVD,
        "res-svd, both whitened": RES_SVD | {"parameters": {"residual_metric": "whitened"}},
        "res-svd, plain then whitened": RES_SVD
        | {"parameters": {"metric": "plain", "residual_metric": "whitened"}},
        "res-svd, last blocks": RES_SVD | {"allocator": "last-blocks"},
    },
    "method": {
        "saes-kfac, pair, uniform": PAPER,
        "saes-svd, pair, uniform": PAPER | {"method": "saes-svd"},
    },
    "refinement": {"block refinement": {"block_refinement": {}}},
    "allocator": {
        "uniform": UNIFORM,
        "energy": {"allocator": "energy"},
        "sensitivity": {"allocator": "sensitivity"},
        "divergence, no floor": {"allocator_parameters": {"floor": 0.0}},
        "divergence, floor 0.75": {"allocator_parameters": {"floor": 0.75}},
        "last blocks": {"allocator": "last-blocks"},
    },
    "attention": {
        f"uniform, attention {keep}": UNIFORM | {"allocator_parameters": {"attention_keep": keep}}
        for keep in (0.6, 0.7, 0.9)
    },
    "gradients": {
        f"{tokens} gradient tokens": {"gradient_tokens": tokens} for tokens in (2048, 4096, 16384)
    },
    "shrinkage": {
        f"shrinkage {share}": {"parameters": {"shrinkage": share}} for share in (0.05, 0.6)
    },
    "layout": {
        "pair": {"layout": "pair"},
        "separate": {"grouping": "separate"},
        "ranks in multiples of 16": {"rank_multiple": 16},
    },
}


def mean_beta(cell: Cell, work: Path) -> float | None:
    """The mean of β over the factored modules; None for the dense model and methods without β."""
    if cell.recipe is None:
        return None
    modules = inspect_checkpoint(checkpoint_of(work, cell.name, cell.keep)).modules
    found = [module.beta for module in modules if module.beta is not None]
    return statistics.mean(found) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", required=True, help="as in `svdserve compress`")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=2_048, help="of the calibration")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--max-chunks", type=int, default=None, help="of the text")
    parser.add_argument("--only", action="append", choices=sorted(CHANGES), default=[])
    given = parser.parse_args()
    same = {
        "calibration": given.calibration,
        "tokens": given.tokens,
        "seq_len": given.seq_len,
    }
    recipes = {"default": make_recipe(**same)} | {
        name: make_recipe(**same, **fields)
        for kind in given.only or CHANGES
        for name, fields in CHANGES[kind].items()
    }
    evaluation = Evaluation(texts=(given.text,), seq_len=1024, max_chunks=given.max_chunks)
    found = compare(str(given.model), given.work, recipes, [given.keep], evaluation)
    rows = {
        cell.name: {
            "perplexity": cell.perplexities[0].perplexity,
            "excess": cell.excess(found.cells[0], 0),
            "stored_bytes": cell.stored_bytes,
            "beta": mean_beta(cell, given.work),
        }
        for cell in found.cells
    }
    one = found.cells[0].perplexities[0]
    result = {
        "model": found.model,
        "keep": given.keep,
        "tokens": given.tokens,
        "calibration": Path(given.calibration).name,
        "text": {"file": given.text.name, "sha256": one.text_sha256, "chunks": one.chunks},
        "recipe": recipes["default"].model_dump(mode="json", exclude={"calibration"}),
        "changes": {kind: CHANGES[kind] for kind in given.only or CHANGES},
        "machine": one.machine.model_dump(mode="json"),
        "results": rows,
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.json, result)
    print(markdown(found))


if __name__ == "__main__":
    main()
