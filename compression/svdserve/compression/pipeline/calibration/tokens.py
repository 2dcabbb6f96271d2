"""Calibration tokens [N, L]: from text files, Hugging Face datasets, or the model itself.

Several sources are joined by "+", as in FILE+self, and share the sequences evenly.
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
    """Find out before a long job whether ``calibration_tokens`` can work.

    Raises:
        UserError: no such file, a malformed dataset name, more sources than sequences, seq_len
            beyond the model's context, or a model without a tokenizer.
    """
    config = load_config(model).get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context < recipe.length:
        raise UserError(
            f"seq_len is {recipe.length}; {model.name} allows at most {context}: give a smaller one"
        )
    sources = _sources(recipe.calibration)
    if len(sources) > recipe.sequences:
        raise UserError(
            f"calibration {recipe.calibration}: {len(sources)} sources and {recipe.sequences} "
            "sequences; give more tokens or a smaller seq_len"
        )
    for source in sources:
        if source != "self":
            texts.check_source(source)
    load_tokenizer(model)


def calibration_digests(recipes: Iterable[Recipe]) -> dict[str, str]:
    """What stands behind the calibration texts of the recipes, by their names.

    The SHA-256 of a file, and the revision of a dataset, whose rows are taken in their order.
    """
    sources = {source for recipe in recipes for source in _sources(recipe.calibration)}
    named = sorted(s for s in sources if texts.is_dataset(s) or Path(s).is_file())
    return {source: texts.digest(source) for source in named}


def calibration_tokens(
    model: Path, recipe: Recipe, device: torch.device | str = "cpu", *, progress: bool = False
) -> Tensor:
    """The calibration token ids of a recipe, [N, L] int64; deterministic in the seed.

    Text is tokenised as a whole and cut into sequences of L, of which N are drawn by the seed. Of a
    file that is much larger than N sequences need, places are drawn and read. A tokenizer that puts
    a BOS token before text gets it before every sequence. Sources follow one another.

    Args:
        model: the dense model.
        recipe: which text, and how much.
        device: where the model runs that writes its own text.
        progress: whether to show a bar meanwhile.

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
    """N pieces of ``room`` tokens [N, room] of a tokenised text, or as many as it has."""
    whole = len(ids) // max(room, 1)
    if room < 1 or whole < 1:
        raise UserError(
            f"calibration {recipe.calibration}: {len(ids)} tokens are less than one sequence of "
            f"{recipe.length}; give more text or a smaller seq_len"
        )
    sequences = ids[: whole * room].view(whole, room)
    generator = torch.Generator().manual_seed(recipe.seed)
    return sequences[torch.randperm(whole, generator=generator)[: recipe.sequences].sort().values]
