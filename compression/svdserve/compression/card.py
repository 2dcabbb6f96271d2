"""The model card: the README.md of a compressed directory."""

import re
from pathlib import Path

import yaml

from svdserve.compression.checkpoint import Checkpoint
from svdserve.compression.files import write_text
from svdserve.compression.methods import get_method
from svdserve.compression.recipe import Recipe, dump_recipe
from svdserve.compression.workdir import parameters_of

CARD_FILE = "README.md"
_RESULTS, _NEXT = "## Results", "## Recipe"
_MIB = 2**20


def model_card(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """Markdown with the front matter of a Hub card: what was done, bytes, use and recipe."""
    base_model, modules = checkpoint.config.base_model, checkpoint.config.modules
    stored, dense = parameters_of(modules)
    nbytes = checkpoint.stored_bytes()
    now, before = nbytes["lowrank"] + nbytes["dense"], nbytes["dense_equivalent"]
    front = {
        "base_model": base_model,
        "base_model_relation": "quantized",
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
{_training(recipe)}

## Use

```sh
pip install 'svdserve[gpu]'   # or svdserve[cpu]
svdserve serve .              # OpenAI-compatible API on vLLM; plain `vllm serve .` works too
svdserve inspect .            # every module: rank, bytes, error
svdserve eval . --text FILE   # perplexity
```

With svdserve installed, `AutoModelForCausalLM.from_pretrained(".")` loads it in transformers.

{_NEXT}

```yaml
{dump_recipe(recipe)}```
"""


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
