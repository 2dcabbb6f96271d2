"""The model card: the README.md of a compressed directory."""

from collections.abc import Mapping

import yaml

from svdserve.compression.methods import get_method
from svdserve.compression.recipe import Recipe, dump_recipe
from svdserve.compression.schema import ModuleSpec


def model_card(
    base_model: str, recipe: Recipe, modules: Mapping[str, ModuleSpec], stored: int, dense: int
) -> str:
    """Markdown with the front matter of a Hub card.

    Args:
        base_model: as given by the user.
        recipe: how the model was compressed.
        modules: the factored ones.
        stored: parameters of their factors.
        dense: parameters that they had before.
    """
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
({stored / max(dense, 1):.3f}). Embeddings, norms and the head are as they were.{_int8(recipe)}\
{_training(recipe)}

## Use

```sh
pip install 'svdserve[gpu]'   # or svdserve[cpu]
svdserve serve .              # OpenAI-compatible API on vLLM; plain `vllm serve .` works too
svdserve inspect .            # every module: rank, bytes, error
svdserve eval . --text FILE   # perplexity
```

With svdserve installed, `AutoModelForCausalLM.from_pretrained(".")` loads it in transformers.

## Recipe

```yaml
{dump_recipe(recipe)}```
"""


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
