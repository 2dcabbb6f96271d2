"""Calibration tokens [N, L]: from text files, Hugging Face datasets, or the model itself.

Several sources are joined by "+", as in FILE+self, and share the sequences evenly.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from svdserve.compression.errors import UserError
from svdserve.compression.integrity import file_sha256
from svdserve.compression.recipe import Recipe

_SAMPLING_BATCH = 32
# Characters of a dataset to read for every token asked for; text has about four a token.
_CHARACTERS_PER_TOKEN = 16


def check_calibration(model: Path, recipe: Recipe) -> None:
    """Find out before a long job whether ``calibration_tokens`` can work.

    Raises:
        UserError: no such file, a malformed dataset name, more sources than sequences, or seq_len
            beyond the model's context.
    """
    context = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)
    if context is not None and recipe.length > context:
        raise UserError(f"seq_len is {recipe.length}; {model.name} allows at most {context}")
    sources = _sources(recipe.calibration)
    if len(sources) > recipe.sequences:
        raise UserError(
            f"calibration {recipe.calibration}: {len(sources)} sources and {recipe.sequences} "
            "sequences; give more tokens or a smaller seq_len"
        )
    for source in sources:
        if source.startswith("hf:"):
            _dataset_parts(source)
        elif source != "self" and not Path(source).is_file():
            raise UserError(
                f"calibration {source}: no such file; give a text file, hf:DATASET or self, or "
                "several joined by +"
            )


def calibration_digests(recipes: Iterable[Recipe]) -> dict[str, str]:
    """SHA-256 of the calibration files of the recipes, by name; what is no file has none."""
    sources = {source for recipe in recipes for source in _sources(recipe.calibration)}
    files = sorted(source for source in sources if Path(source).is_file())
    return {file: file_sha256(Path(file)) for file in files}


def calibration_tokens(model: Path, recipe: Recipe) -> Tensor:
    """The calibration token ids of a recipe, [N, L] int64; deterministic in the seed.

    Text is tokenised as a whole and cut into sequences of L, of which N are drawn by the seed; a
    tokenizer that puts a BOS token before text gets it before every sequence. Sources follow one
    another.

    Raises:
        UserError: a text is shorter than one sequence.
    """
    sources = _sources(recipe.calibration)
    share, more = divmod(recipe.sequences, len(sources))
    counts = [share + (index < more) for index in range(len(sources))]
    parts = [
        recipe.model_copy(update={"calibration": source, "tokens": count * recipe.length})
        for source, count in zip(sources, counts, strict=True)
    ]
    return torch.cat([_draw(model, part) for part in parts])


def _sources(calibration: str) -> list[str]:
    return [calibration] if Path(calibration).is_file() else calibration.split("+")


def _draw(model: Path, recipe: Recipe) -> Tensor:
    """The tokens of one source."""
    if recipe.calibration == "self":
        return _sample(model, recipe)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = _read(recipe)
    bos = _bos(tokenizer)
    room = recipe.length - len(bos)
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids = torch.tensor(encoded["input_ids"])
    whole = len(ids) // max(room, 1)
    if room < 1 or whole < 1:
        raise UserError(
            f"calibration {recipe.calibration}: {len(ids)} tokens are less than one sequence of "
            f"{recipe.length}; give more text or a smaller seq_len"
        )
    sequences = ids[: whole * room].view(whole, room)
    generator = torch.Generator().manual_seed(recipe.seed)
    chosen = torch.randperm(whole, generator=generator)[: recipe.sequences].sort().values
    prefix = torch.tensor(bos, dtype=ids.dtype).expand(len(chosen), -1)
    return torch.cat([prefix, sequences[chosen]], dim=1)


def _bos(tokenizer: Any) -> list[int]:
    ids = tokenizer("").input_ids
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []


def _read(recipe: Recipe) -> str:
    if not recipe.calibration.startswith("hf:"):
        try:
            return Path(recipe.calibration).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"calibration {recipe.calibration}: {error}") from None
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            "calibration from a dataset needs the package datasets; pip install 'svdserve[eval]'"
        ) from None
    name, config, split, column = _dataset_parts(recipe.calibration)
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"calibration {recipe.calibration}: {first}") from None
    return _join(rows, column, recipe)


def _dataset_parts(source: str) -> tuple[str, str | None, str, str]:
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 4:
        raise UserError(f"calibration {source}: write hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]")
    parts += [""] * (4 - len(parts))
    return parts[0], parts[1] or None, parts[2] or "train", parts[3] or "text"


def _join(rows: Iterable[dict[str, Any]], column: str, recipe: Recipe) -> str:
    pieces: list[str] = []
    size, enough = 0, recipe.tokens * _CHARACTERS_PER_TOKEN
    for row in rows:
        if column not in row:
            raise UserError(
                f"calibration {recipe.calibration}: no column {column!r}; it has {', '.join(row)}"
            )
        pieces.append(str(row[column]))
        size += len(pieces[-1])
        if size >= enough:
            break
    return "\n\n".join(pieces)


@torch.no_grad()
def _sample(model: Path, recipe: Recipe) -> Tensor:
    """Text that the model writes itself: a random first token, then plain sampling.

    LLM-QAT (arXiv 2305.17888, section 3.1). The whole model is in memory meanwhile.
    """
    # Eager: on CPU, sdpa of one bfloat16 query over a long context takes twice as long.
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    special = set(tokenizer.all_special_ids)
    allowed = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    bos = _bos(tokenizer)
    set_seed(recipe.seed)
    rows: list[Tensor] = []
    for start in range(0, recipe.sequences, _SAMPLING_BATCH):
        count = min(_SAMPLING_BATCH, recipe.sequences - start)
        first = allowed[torch.randint(len(allowed), (count, 1))]
        prompt = torch.cat([torch.tensor(bos, dtype=first.dtype).expand(count, -1), first], dim=1)
        prompt = prompt[:, : recipe.length]
        if prompt.shape[1] < recipe.length:
            prompt = network.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_length=recipe.length,
                max_length=recipe.length,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        rows.append(prompt)
    return torch.cat(rows)
