"""Calibration tokens [N, L] from text files, Hugging Face datasets, or the model itself.

A "+" joins several sources, as in FILE+self; they share the sequences evenly.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from svdserve.compression.model.building import (
    check_ids,
    load_config,
    load_tokenizer,
    starts_with_bos,
)
from svdserve.compression.pipeline.calibration import texts
from svdserve.compression.pipeline.calibration.sampling import sample
from svdserve.compression.pipeline.recipe import Recipe
from svdserve.compression.system.errors import UserError


def check_calibration(model: Path, recipe: Recipe) -> None:
    """Check before a long job the input of ``calibration_tokens``.

    Raises:
        UserError: a file is missing, a dataset name is malformed, there are more sources than
            sequences, seq_len exceeds the model's context, or the model has no tokenizer.
    """
    config = load_config(model).get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context < recipe.length:
        raise UserError(
            f"seq_len is {recipe.length}, but {model.name} allows at most {context}; give a "
            "smaller one"
        )
    sources = _sources(recipe.calibration)
    if len(sources) > recipe.sequences:
        raise UserError(
            f"calibration {recipe.calibration}: {len(sources)} sources but only {recipe.sequences} "
            "sequences; give more tokens or a smaller seq_len"
        )
    for source in sources:
        if source != "self":
            texts.check_source(source)
    load_tokenizer(model)


def calibration_digests(recipes: Iterable[Recipe]) -> dict[str, str]:
    """The ``texts.digest`` of every calibration source of the recipes except ``self``, by name."""
    sources = {source for recipe in recipes for source in _sources(recipe.calibration)}
    named = sorted(s for s in sources if texts.is_dataset(s) or Path(s).is_file())
    return {source: texts.digest(source) for source in named}


def calibration_tokens(
    model: Path, recipe: Recipe, device: torch.device | str = "cpu", *, progress: bool = False
) -> Tensor:
    """The calibration token ids of a recipe, [N, L] int64, determined by the seed.

    Text is tokenised completely and cut into sequences of L tokens, of which the seed draws N. From
    a file that is much larger than necessary, only randomly drawn windows are read. If the
    tokenizer puts a BOS token before text, every sequence starts with it. The sequences of the
    sources follow one another.

    Args:
        model: the dense model.
        recipe: the sources, the number and length of the sequences, and the seed.
        device: the device of the model for the source ``self``.
        progress: whether to show a bar while the model writes text.

    Raises:
        UserError: a text is shorter than one sequence, or has tokens that the model does not know.
    """
    sources = _sources(recipe.calibration)
    share, more = divmod(recipe.sequences, len(sources))
    counts = [share + (index < more) for index in range(len(sources))]
    parts = [
        recipe.model_copy(update={"calibration": source, "tokens": count * recipe.length})
        for source, count in zip(sources, counts, strict=True)
    ]
    return torch.cat([_draw(model, part, torch.device(device), progress) for part in parts])


def _sources(calibration: str) -> list[str]:
    return [calibration] if Path(calibration).is_file() else calibration.split("+")


def _draw(model: Path, recipe: Recipe, device: torch.device, progress: bool) -> Tensor:
    """The tokens of one source."""
    if recipe.calibration == "self":
        return sample(model, recipe, device, progress)
    tokenizer = load_tokenizer(model)
    bos = torch.tensor(starts_with_bos(tokenizer), dtype=torch.int64)
    room = recipe.length - len(bos)

    def encode(text: str) -> list[int]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids: list[int] = tokenizer(text, **options)["input_ids"]
        return ids

    if room >= 1 and texts.is_large(recipe):
        chosen = torch.tensor(texts.windows(recipe, room, encode))
    else:
        chosen = _pieces(torch.tensor(encode(texts.read(recipe, tokenizer))).long(), room, recipe)
    tokens = torch.cat([bos.expand(len(chosen), -1), chosen], dim=1)
    check_ids(model, load_config(model), tokens, recipe.calibration)
    return tokens


def _pieces(ids: Tensor, room: int, recipe: Recipe) -> Tensor:
    """N sequences [N, room] that the seed draws from a tokenised text, or fewer if it is short."""
    whole = len(ids) // max(room, 1)
    if room < 1 or whole < 1:
        raise UserError(
            f"calibration {recipe.calibration}: {len(ids)} tokens are less than one sequence of "
            f"{recipe.length}; give more text or a smaller seq_len"
        )
    sequences = ids[: whole * room].view(whole, room)
    generator = torch.Generator().manual_seed(recipe.seed)
    return sequences[torch.randperm(whole, generator=generator)[: recipe.sequences].sort().values]
