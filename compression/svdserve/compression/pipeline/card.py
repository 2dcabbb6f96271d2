"""The model card: the README.md of a compressed directory."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from yaml import YAMLError

from svdserve.compression.format.codecs import get_codec
from svdserve.compression.format.log import LOG_FILE, read_log
from svdserve.compression.format.reader import Checkpoint, is_checkpoint
from svdserve.compression.format.schema import parameters_of
from svdserve.compression.methods import get_method
from svdserve.compression.model.hub import as_hub_name, hub_name
from svdserve.compression.pipeline.recipe import Recipe, dump_recipe
from svdserve.compression.system.files import write_text

CARD_FILE = "README.md"
_RESULTS, _NEXT = "## Results", "## Recipe"
_MIB = 2**20
_TERMS = ("license", "license_name", "license_link", "language")


def model_card(checkpoint: Checkpoint, recipe: Recipe, source: Path) -> str:
    """The model card as Markdown with front matter for the Hub: method, bytes, usage and recipe.

    Args:
        checkpoint: the checkpoint that the card describes.
        recipe: the recipe of the checkpoint.
        source: the dense model, or the checkpoint that was refined; licence and languages come from
            its card.
    """
    base_model, modules = checkpoint.config.base_model, checkpoint.config.modules
    stored, dense = parameters_of(modules)
    nbytes = checkpoint.stored_bytes()
    now, before = nbytes["lowrank"] + nbytes["dense"], nbytes["dense_equivalent"]
    front = {
        **_origin(source),
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


def add_results(directory: Path, table: str) -> None:
    """Put a Markdown table of measurements into the card of a checkpoint; replaces an older one."""
    card = directory / CARD_FILE
    text = re.sub(
        rf"{_RESULTS}\n.*?(?=^{_NEXT}$)", "", card.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    before, heading, after = text.partition(f"{_NEXT}\n")
    write_text(card, f"{before}{_RESULTS}\n\n{table}\n{heading}{after}")


def _origin(source: Path) -> dict[str, str | list[str]]:
    """The fields of a card's front matter that come from the model in ``source``.

    A local folder is not named as base model, because the Hub does not know it.
    """
    known = _front_matter(source)
    found: dict[str, str | list[str]] = {}
    if is_checkpoint(source):
        if base := _hub_names(known.get("base_model")):
            found = {"base_model": base, "base_model_relation": "quantized"}
    elif name := hub_name(source):
        found = {"base_model": name, "base_model_relation": "quantized"}
    elif base := _hub_names(known.get("base_model")):
        found = {"base_model": base}  # another model lies between, so no relation is stated
    for field in _TERMS:
        value = known.get(field)
        if field == "language":  # YAML reads the code of Norwegian, no, as False
            value = [_language(item) for item in (value if isinstance(value, list) else [value])]
            value = [item for item in value if item]
        if (isinstance(value, str) and value) or (isinstance(value, list) and value):
            found[field] = value
    return found


def _front_matter(source: Path) -> dict[str, Any]:
    """The front matter of the card in ``source``; empty if it has no readable card."""
    card = source / CARD_FILE
    try:
        return metadata_load(card) or {} if card.is_file() else {}
    except (OSError, ValueError, YAMLError, RecursionError):
        return {}


def _hub_names(value: Any) -> str | list[str] | None:
    """The names of the form owner/name; cards that training tools write may name a folder."""
    if isinstance(value, list):
        return [name for item in value if (name := _hub_names(item)) and isinstance(name, str)]
    return name if (name := as_hub_name(value)) is not None and "/" in name else None


def _language(value: Any) -> str | None:
    return "no" if value is False else value if isinstance(value, str) else None


def _int8(recipe: Recipe) -> str:
    """A sentence on the storage of the blocks' weights, if their codec is not plain."""
    if get_codec(recipe.weights).plain:
        return ""
    return (
        "\nThe linears of the blocks, factored or dense, are stored in int8 with one float32 scale"
        "\nfor each row; vLLM multiplies them with int8 activations."
    )


def _reordered(checkpoint: Checkpoint) -> str:
    """A sentence on a resume that changed the order of sums, if the log has such an event."""
    events = read_log(checkpoint.directory / LOG_FILE)
    if not any(event.get("event") == "resumed_anyway" for event in events):
        return ""
    return (
        "\nThe job was resumed with another device, batch size, number of threads or version of"
        "\ntorch (`--resume-anyway`), so the recipe gives these factors up to rounding only."
    )


def _training(recipe: Recipe) -> str:
    """A sentence on the training of the factors after the closed form."""
    done = []
    if recipe.block_refinement is not None:
        done.append("block by block towards the outputs of the dense model's blocks")
    if recipe.refinement is not None:
        done.append("end to end towards the dense model's predictions")
    if not done:
        return ""
    return f"\nThe factors were trained on the calibration tokens, {', then '.join(done)}."
