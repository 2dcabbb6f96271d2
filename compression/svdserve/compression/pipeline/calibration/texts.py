"""Calibration text from files and datasets, and digests that identify its version."""

import codecs
import hashlib
import random
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from svdserve.compression.format.integrity import file_sha256, fingerprint
from svdserve.compression.pipeline.recipe import Recipe
from svdserve.compression.system.errors import UserError

# A larger file is sampled instead of read completely.
_WHOLE_BYTES, _WHOLE_BYTES_PER_TOKEN = 1 << 20, 64
_WINDOW_BYTES_PER_TOKEN, _SMALLEST_WINDOW = 16, 4096
# Windows of a large file to try for each sequence; one is enough unless tokens are long.
_TRIES, _MORE_TRIES = 8, 64
_DIGEST_BYTES = 1 << 26
# Characters of a dataset to read for each requested token; text has about four for each token.
_CHARACTERS_PER_TOKEN = 16


def is_dataset(source: str) -> bool:
    return source.startswith("hf:")


def check_source(source: str) -> None:
    """Raise UserError unless ``source`` is a readable file or a well-formed dataset name."""
    if is_dataset(source):
        _dataset_parts(source)
        return
    if not Path(source).is_file():
        raise UserError(
            f"calibration {source}: no such file; give a text file, hf:DATASET or self, or "
            "several joined by +"
        )
    try:
        Path(source).open("rb").close()
    except OSError as error:
        raise UserError(
            f"calibration {source}: cannot be read ({error.strerror}); give a readable file"
        ) from None


def digest(source: str) -> str:
    """A string that identifies the version of a text without reading much of it.

    It is the SHA-256 of a file, the ``fingerprint`` of a large file, or the revision of a dataset
    together with the order of its rows.

    Raises:
        UserError: the Hub does not report the revision, or a file cannot be read.
    """
    if is_dataset(source):
        return f"revision {_revision(source)}, rows in order"
    return _file_digest(Path(source))


def is_large(recipe: Recipe) -> bool:
    """Whether the source of a recipe is a file so large that ``windows`` samples it."""
    if is_dataset(recipe.calibration):
        return False
    enough = _WHOLE_BYTES + _WHOLE_BYTES_PER_TOKEN * recipe.tokens
    return Path(recipe.calibration).stat().st_size > enough


def windows(recipe: Recipe, room: int, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """N sequences of ``room`` tokens from windows of a large file, which the seed draws.

    The windows do not overlap; in text with spaces, they start and end between words. The work
    depends on the number of tokens, not on the size of the file.

    Args:
        recipe: a recipe whose only source is a file.
        room: number of tokens in a sequence.
        encode: gives the token ids of a text.

    Raises:
        UserError: the file is not UTF-8, or its text has too few tokens.
    """
    path, width = Path(recipe.calibration), max(_SMALLEST_WINDOW, room * _WINDOW_BYTES_PER_TOKEN)
    places = range(path.stat().st_size // width)
    tries = min(len(places), _TRIES * recipe.sequences + _MORE_TRIES)
    sequences: list[list[int]] = []
    found: list[int] = []
    with path.open("rb") as file:
        for place in random.Random(recipe.seed).sample(places, tries):
            file.seek(place * width)
            found += encode(_words(file.read(width), path, place * width))
            if len(found) >= room:
                sequences.append(found[:room])
                found = []
            if len(sequences) == recipe.sequences:
                return sequences
    raise UserError(
        f"calibration {path}: {tries} windows of {width:,} bytes give {len(sequences)} sequences "
        f"of {recipe.length} tokens, but {recipe.sequences} are needed; give a text of words, or "
        "fewer tokens"
    )


def _words(data: bytes, path: Path, offset: int) -> str:
    """The complete words in a cut of UTF-8 text."""
    start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[start:])
    except UnicodeDecodeError as error:
        raise UserError(
            f"calibration {path}: is not UTF-8 text ({error.reason} at byte "
            f"{offset + start + error.start}); convert it"
        ) from None
    _refuse_zeros(text, f"calibration {path}")
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as read_file does
    if len(text.split(maxsplit=2)) < 3:
        return text
    return text.split(maxsplit=1)[1].rsplit(maxsplit=1)[0]


def read(recipe: Recipe, tokenizer: Any) -> str:
    """The text of a file, or of as many rows of a dataset as the recipe's tokens need.

    Args:
        recipe: a recipe with one source.
        tokenizer: the tokenizer, whose chat template formats chats.

    Raises:
        UserError: the source cannot be read, or a row is neither text nor a chat.
    """
    if is_dataset(recipe.calibration):
        return _join(recipe, tokenizer)
    return read_file(Path(recipe.calibration), f"calibration {recipe.calibration}")


def read_file(path: Path, called: str, characters: int = -1) -> str:
    """The first ``characters`` of a text file, or all of it.

    Args:
        called: the name of the file in messages.

    Raises:
        UserError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(characters)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{called}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from None
    except OSError as error:
        raise UserError(f"{called}: cannot be read ({error.strerror})") from None
    _refuse_zeros(text, called)
    return text


def _refuse_zeros(text: str, called: str) -> None:
    """Raise UserError for UTF-16 without BOM, which decodes as UTF-8 with many zero bytes."""
    if "\0" in text:
        raise UserError(
            f"{called}: has zero bytes, so it is UTF-16 or no text; convert it to UTF-8 text"
        )


def _dataset_parts(source: str) -> tuple[str, str | None, str | None, str, str]:
    """Name, revision, configuration, split and column of ``hf:DATASET...``."""
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
    """The commit of a dataset of the Hub, or a digest of the files of a local dataset."""
    name, given, *_ = _dataset_parts(source)
    path = Path(name)
    if path.is_file():
        return _file_digest(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        named = [f"{file.relative_to(path).as_posix()} {_file_digest(file)}\n" for file in files]
        return hashlib.sha256("".join(named).encode()).hexdigest()
    if given is not None and re.fullmatch("[0-9a-f]{40}", given):
        return given
    return _commit(source, name, given)


@cache  # one process must record and read the same revision
def _commit(source: str, name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:
        raise UserError(
            f"calibration {source}: no such file or folder, and the Hub does not report its "
            f"revision ({_first_line(error)}); check the name and the network, or give a text file"
        ) from None


def _file_digest(path: Path) -> str:
    try:
        return file_sha256(path) if path.stat().st_size <= _DIGEST_BYTES else fingerprint([path])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _rows(source: str) -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            "calibration from a dataset needs the package datasets: pip install 'svdserve[eval]'"
        ) from None
    name, _, config, split, _ = _dataset_parts(source)
    local = Path(name)
    try:
        if local.is_file():
            kind = {".jsonl": "json", ".txt": "text"}.get(local.suffix, local.suffix[1:])
            files = str(local.resolve())
            yield from load_dataset(kind, data_files=files, split=split, streaming=True)
            return
        revision = None if local.is_dir() else _revision(source)
        yield from load_dataset(name, config, split=split, streaming=True, revision=revision)
    except UserError:
        raise
    except Exception as error:  # datasets and its readers of files raise many kinds
        raise UserError(
            f"calibration {source}: {_first_line(error)}; check the name, configuration and split"
        ) from None


def _join(recipe: Recipe, tokenizer: Any) -> str:
    *_, column = _dataset_parts(recipe.calibration)
    pieces: list[str] = []
    size, enough = 0, recipe.tokens * _CHARACTERS_PER_TOKEN
    for number, row in enumerate(_rows(recipe.calibration)):
        if column not in row:
            raise UserError(
                f"calibration {recipe.calibration}: row {number} has no column {column!r}; it has "
                f"{', '.join(row)}; add :CONFIG:SPLIT:COLUMN"
            )
        if row[column] is None or row[column] == []:
            continue
        pieces.append(_as_text(row[column], number, column, recipe, tokenizer))
        size += len(pieces[-1])
        if size >= enough:
            break
    return "\n\n".join(pieces)


def _as_text(value: Any, number: int, column: str, recipe: Recipe, tokenizer: Any) -> str:
    """The text of a row of a dataset; the model's chat template formats a chat."""
    if isinstance(value, str):
        return value
    where = f"calibration {recipe.calibration}: column {column!r}, row {number}"
    if not isinstance(value, list) or not all(
        isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in value
    ):
        kind = type(value).__name__
        if isinstance(value, list):
            kind += f" of {type(value[0]).__name__}"
        raise UserError(
            f"{where} is {kind}, neither text nor a chat of role and content; name another column"
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"{where} is a chat, but the model's tokenizer has no chat template; name a column of "
            "text"
        )
    try:
        return str(tokenizer.apply_chat_template(value, tokenize=False))
    except Exception as error:  # a template is arbitrary code of the model's author
        raise UserError(
            f"{where}: the model's chat template refuses it ({_first_line(error)}); name another "
            "column, or remove such rows"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
