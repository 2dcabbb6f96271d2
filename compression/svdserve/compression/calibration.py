"""Calibration tokens [N, L]: from text files, Hugging Face datasets, or the model itself.

Several sources are joined by "+", as in FILE+self, and share the sequences evenly.
"""

import codecs
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from svdserve.compression.building import (
    check_ids,
    embedding_rows,
    load_config,
    load_tokenizer,
    transformers_says,
)
from svdserve.compression.errors import UserError
from svdserve.compression.integrity import file_sha256, fingerprint
from svdserve.compression.permissions import remote_code
from svdserve.compression.progress import bar
from svdserve.compression.recipe import Recipe

_SAMPLING_BATCH = 32
# A file of more bytes than these is sampled instead of read whole.
_WHOLE_BYTES, _WHOLE_BYTES_PER_TOKEN = 1 << 20, 64
_WINDOW_BYTES_PER_TOKEN = 16
# Characters of a dataset to read for every token asked for; text has about four a token.
_CHARACTERS_PER_TOKEN = 16


def check_calibration(model: Path, recipe: Recipe) -> None:
    """Find out before a long job whether ``calibration_tokens`` can work.

    Raises:
        UserError: no such file, a malformed dataset name, more sources than sequences, or seq_len
            beyond the model's context.
    """
    config = load_config(model).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and recipe.length > context:
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
    """What stands behind the calibration texts of the recipes, by their names.

    The SHA-256 of a file, and the revision of a dataset, whose rows are taken in their order.
    """
    sources = {source for recipe in recipes for source in _sources(recipe.calibration)}
    files = sorted(source for source in sources if Path(source).is_file())
    datasets = sorted(source for source in sources if source.startswith("hf:"))
    return {file: file_sha256(Path(file)) for file in files} | {
        source: f"revision {_revision(source)}, rows in order" for source in datasets
    }


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
    tokens = torch.cat([_draw(model, part, torch.device(device), progress) for part in parts])
    check_ids(model, tokens)
    return tokens


def _sources(calibration: str) -> list[str]:
    return [calibration] if Path(calibration).is_file() else calibration.split("+")


def _draw(model: Path, recipe: Recipe, device: torch.device, progress: bool) -> Tensor:
    """The tokens of one source."""
    if recipe.calibration == "self":
        return _sample(model, recipe, device, progress)
    tokenizer = load_tokenizer(model)
    bos = _bos(tokenizer)
    room = recipe.length - len(bos)

    def encode(text: str) -> list[int]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids: list[int] = tokenizer(text, **options)["input_ids"]
        return ids

    if _is_large(recipe) and room >= 1:
        chosen = torch.tensor(_windows(Path(recipe.calibration), recipe, room, encode))
        return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(len(chosen), -1), chosen], 1)
    ids = torch.tensor(encode(_read(recipe, tokenizer)), dtype=torch.int64)
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


def _is_large(recipe: Recipe) -> bool:
    path, enough = Path(recipe.calibration), _WHOLE_BYTES + _WHOLE_BYTES_PER_TOKEN * recipe.tokens
    return not recipe.calibration.startswith("hf:") and path.stat().st_size > enough


def _windows(
    path: Path, recipe: Recipe, room: int, encode: Callable[[str], list[int]]
) -> list[list[int]]:
    """N sequences of ``room`` tokens from places of a large file that the seed draws.

    The places do not overlap, and begin and end between words where the text has spaces.

    Raises:
        UserError: the file is not UTF-8, or all of it has too few tokens.
    """
    width = max(4096, room * _WINDOW_BYTES_PER_TOKEN)
    generator = torch.Generator().manual_seed(recipe.seed)
    places = torch.randperm(path.stat().st_size // width, generator=generator)
    sequences: list[list[int]] = []
    found: list[int] = []
    with path.open("rb") as file:
        for place in places.tolist():
            file.seek(place * width)
            found += encode(_words(file.read(width), path, place * width))
            if len(found) >= room:
                sequences.append(found[:room])
                found = []
            if len(sequences) == recipe.sequences:
                return sequences
    raise UserError(
        f"calibration {recipe.calibration}: all of it makes {len(sequences)} sequences of "
        f"{recipe.length} tokens, and {recipe.sequences} are wanted; give fewer --tokens"
    )


def _words(data: bytes, path: Path, offset: int) -> str:
    """The whole words of bytes that were cut out of UTF-8 text."""
    start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[start:])
    except UnicodeDecodeError as error:
        raise UserError(
            f"calibration {path}: is not UTF-8 text ({error.reason} near byte {offset}); convert it"
        ) from None
    if len(text.split(maxsplit=2)) < 3:
        return text
    return text.split(maxsplit=1)[1].rsplit(maxsplit=1)[0]


def _bos(tokenizer: Any) -> list[int]:
    ids = tokenizer("").input_ids
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []


def _read(recipe: Recipe, tokenizer: Any) -> str:
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
    name, _, config, split, column = _dataset_parts(recipe.calibration)
    revision = None if Path(name).exists() else _revision(recipe.calibration)
    try:
        rows = load_dataset(name, config, split=split, streaming=True, revision=revision)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"calibration {recipe.calibration}: {first}") from None
    return _join(rows, column, recipe, tokenizer)


def _dataset_parts(source: str) -> tuple[str, str | None, str | None, str, str]:
    """Name, revision, configuration, split and column."""
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 4:
        raise UserError(
            f"calibration {source}: write hf:DATASET[@REVISION][:CONFIG[:SPLIT[:COLUMN]]]"
        )
    parts += [""] * (4 - len(parts))
    name, revision = parts[0], None
    if not Path(name).exists():
        name, _, found = name.partition("@")
        revision = found or None
    return name, revision, parts[1] or None, parts[2] or "train", parts[3] or "text"


def _revision(source: str) -> str:
    """The commit of a dataset of the Hub, or a digest of the files of a local one.

    Raises:
        UserError: the Hub cannot tell.
    """
    name, given, *_ = _dataset_parts(source)
    if Path(name).exists():
        files = [Path(name)] if Path(name).is_file() else sorted(Path(name).rglob("*"))
        return fingerprint(file for file in files if file.is_file())
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=given).sha)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"calibration {source}: the Hub does not tell its revision ({first}); check the name "
            "and the network, or give a text file"
        ) from None


def _join(rows: Iterable[dict[str, Any]], column: str, recipe: Recipe, tokenizer: Any) -> str:
    pieces: list[str] = []
    size, enough = 0, recipe.tokens * _CHARACTERS_PER_TOKEN
    for row in rows:
        if column not in row:
            raise UserError(
                f"calibration {recipe.calibration}: no column {column!r}; it has {', '.join(row)}"
            )
        if row[column] is None:
            continue
        pieces.append(_as_text(row[column], column, recipe, tokenizer))
        size += len(pieces[-1])
        if size >= enough:
            break
    return "\n\n".join(pieces)


def _as_text(value: Any, column: str, recipe: Recipe, tokenizer: Any) -> str:
    """A row of a dataset: text as it is, and a chat as the model's own template writes it."""
    if isinstance(value, str):
        return value
    chat = (
        isinstance(value, list)
        and value
        and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in value)
    )
    if not chat:
        raise UserError(
            f"calibration {recipe.calibration}: column {column!r} holds {type(value).__name__}, "
            "neither text nor a chat of role and content; name another column"
        )
    with transformers_says(Path(tokenizer.name_or_path), "write a chat by the model's template"):
        return str(tokenizer.apply_chat_template(value, tokenize=False))


class _Shown(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; tells the length of the sequences after every token."""

    def __init__(self, notify: Callable[[int], None]) -> None:
        self._notify = notify

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        self._notify(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def _sample(model: Path, recipe: Recipe, device: torch.device, progress: bool) -> Tensor:
    """Text that the model writes itself: a random first token, then plain sampling.

    LLM-QAT (arXiv 2305.17888, section 3.1). The whole model is in memory meanwhile. Whatever
    generation_config.json asks for is left out, but for the tokens that end a text.
    """
    # Eager: on CPU, sdpa of one bfloat16 query over a long context takes twice as long.
    with transformers_says(model, "load the model"):
        network = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", attn_implementation="eager", **remote_code()
        )
    network = network.eval().to(device)
    ends = network.generation_config.eos_token_id
    network.generation_config = GenerationConfig(eos_token_id=ends)
    tokenizer = load_tokenizer(model)
    special = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), embedding_rows(network.config) or len(tokenizer))
    allowed = torch.tensor([i for i in range(known) if i not in special])
    bos = _bos(tokenizer)
    set_seed(recipe.seed)
    rows: list[Tensor] = []
    with bar(progress) as shown:
        task = shown.add_task("sampling", total=recipe.sequences * recipe.length, facts="")
        for start in range(0, recipe.sequences, _SAMPLING_BATCH):
            count = min(_SAMPLING_BATCH, recipe.sequences - start)

            def notify(length: int, start: int = start, count: int = count) -> None:
                shown.update(task, completed=start * recipe.length + count * length)

            first = allowed[torch.randint(len(allowed), (count, 1))]
            rows.append(_continued(network, first, bos, recipe.length, tokenizer, notify))
    return torch.cat(rows)


def _continued(
    network: Any,
    first: Tensor,
    bos: list[int],
    length: int,
    tokenizer: Any,
    notify: Callable[[int], None],
) -> Tensor:
    """Sequences [B, length] that begin with ``bos`` and ``first`` [B, 1], on the CPU."""
    prompt = torch.cat([torch.tensor(bos, dtype=first.dtype).expand(len(first), -1), first], dim=1)
    prompt = prompt[:, :length].to(network.device)
    if prompt.shape[1] < length:
        prompt = network.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_length=length,
            max_length=length,
            pad_token_id=tokenizer.pad_token_id or 0,
            stopping_criteria=StoppingCriteriaList([_Shown(notify)]),
        )
    return prompt.cpu()
