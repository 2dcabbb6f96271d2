"""The model card: the README.md of a compressed directory."""

import re
from pathlib import Path
from typing import Any

import yaml

from svdserve.compression.checkpoint import LOG_FILE, Checkpoint
from svdserve.compression.files import write_text
from svdserve.compression.methods import get_method
from svdserve.compression.progress import read_log
from svdserve.compression.recipe import Recipe, dump_recipe
from svdserve.compression.workdir import parameters_of

CARD_FILE = "README.md"
_RESULTS, _NEXT = "## Results", "## Recipe"
_MIB = 2**20
_CARRIED = ("license", "license_name", "license_link", "language")


def model_card(checkpoint: Checkpoint, recipe: Recipe, source: Path | None = None) -> str:
    """Markdown with the front matter of a Hub card: what was done, bytes, use and recipe.

    Args:
        checkpoint: what the card is of.
        recipe: what was computed.
        source: the dense model's directory, or one whose card has been made from it: its licence
            and its name on the Hub are taken over.
    """
    base_model, modules = checkpoint.config.base_model, checkpoint.config.modules
    stored, dense = parameters_of(modules)
    nbytes = checkpoint.stored_bytes()
    now, before = nbytes["lowrank"] + nbytes["dense"], nbytes["dense_equivalent"]
    front = _carried(base_model, source) | {
        "library_name": "transformers",
        "tags": ["svdserve", "low-rank", recipe.method],
    }
    method = get_method(recipe.method)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---
# {base_model}, compressed with {method.title}

The weights of {len(modules)} linear modules are stored as low-rank factors
([{method.title}]({method.paper})): {stored:,} parameters instead of {dense:,}
({stored / max(dense, 1):.3f}). All weights of the model take {now / _MIB:,.1f} MiB instead of
{before / _MIB:,.1f} MiB. Embeddings, norms and the head are as they were.{_int8(recipe)}\
{_training(recipe)}{_reordered(checkpoint)}

## Use

```sh
pip install 'svdserve[gpu]'   # or svdserve[cpu]
svdserve serve .              # OpenAI-compatible API on vLLM; plain `vllm serve .` works too
svdserve inspect .            # every module: rank, bytes, error
svdserve eval . --text FILE   # perplexity
```

After `import svdserve.compression`, `AutoModelForCausalLM.from_pretrained(".")` loads it.

{_NEXT}

```yaml
{dump_recipe(recipe)}```
"""


def _carried(base_model: str, source: Path | None) -> dict[str, Any]:
    """What the front matter takes over from the source: a name that the Hub knows, the licence."""
    card = None if source is None else source / CARD_FILE
    found = _front_matter(card.read_text(errors="replace")) if card and card.is_file() else {}
    front = {key: found[key] for key in _CARRIED if key in found}
    name = base_model
    if source is not None and source.resolve().parent.name == "snapshots":
        name = source.resolve().parent.parent.name.removeprefix("models--").replace("--", "/")
    if name.count("/") != 1 and "svdserve" in (found.get("tags") or []):
        name = str(found.get("base_model", ""))
    if name.count("/") == 1:
        front |= {"base_model": name, "base_model_relation": "quantized"}
    return front


def _front_matter(text: str) -> dict[str, Any]:
    """The YAML block at the head of a card; empty where it has none that can be read."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, flags=re.S)
    try:
        found = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def add_results(directory: Path, table: str) -> None:
    """Put a Markdown table of measurements into the card of a checkpoint, for what was there."""
    card = directory / CARD_FILE
    text = re.sub(rf"{_RESULTS}\n.*?(?=^{_NEXT}$)", "", card.read_text(), flags=re.M | re.S)
    before, heading, after = text.partition(f"{_NEXT}\n")
    write_text(card, f"{before}{_RESULTS}\n\n{table}\n{heading}{after}")


def _int8(recipe: Recipe) -> str:
    """How the weights of the blocks are stored, if not in the dtype of the model."""
    if recipe.weights == "float":
        return ""
    return (
        "\nThe linears of the blocks, factored or dense, are stored in int8 with one float32 scale"
        "\nfor each row; vLLM multiplies them with int8 activations."
    )


def _reordered(checkpoint: Checkpoint) -> str:
    """That another run of the recipe ends in other last digits, where the log tells so."""
    events = read_log(checkpoint.directory / LOG_FILE)
    if not any(event.get("event") == "resumed_anyway" for event in events):
        return ""
    return (
        "\nThe job was resumed with another device, batch size, number of threads or version of"
        "\ntorch (`--resume-anyway`), so the recipe gives these factors up to rounding only."
    )


def _training(recipe: Recipe) -> str:
    """What was done to the factors after the closed form."""
    done = []
    if recipe.block_refinement is not None:
        done.append("block by block towards the outputs of the dense model's blocks")
    if recipe.refinement is not None:
        done.append("end to end towards the dense model's predictions")
    if not done:
        return ""
    return f"\nThe factors were trained on the calibration tokens, {', then '.join(done)}."
