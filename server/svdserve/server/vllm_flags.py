"""The flags of `vllm serve`, and the one word among them that names the model."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from svdserve.compression.system.errors import UserError
from svdserve.server.cpu_install import work_around

_MODEL = "--model"
_SEVERAL = ("+", "*")
Nargs = int | str | None


def find_model(words: Sequence[str], configured: str | None = None) -> tuple[str, list[str]]:
    """The model, and the other words in their order.

    The model stands first, anywhere among the flags, or after ``--``, or is the value of
    ``--model``. If it follows a flag that takes several values, the last value is the model if it
    is a directory. vLLM knows its flags but is slow to import, so it is imported only if a flag
    stands first.

    Args:
        words: of the command line, without svdserve's own options.
        configured: the model that the file of ``--config`` names; used if the words name none.

    Raises:
        UserError: there is no model, or more than one, or vLLM is needed and not installed.
    """
    rest, named = list(words), list[str]()
    for i, word in reversed(list(enumerate(words))):
        flag, equals, value = word.partition("=")
        if flag == _MODEL:
            value = value if equals else "".join(words[i + 1 : i + 2])
            if not value:
                raise UserError(f"{_MODEL} needs a directory or a Hub name")
            named.append(value)
            del rest[i : i + (1 if equals else 2)]
    places = list(takewhile(lambda i: not rest[i].startswith("-"), range(len(rest))))
    if rest and not places and (len(rest) > 1 or not named):
        places = model_places(rest, serve_flags())
    found = [*named, *(rest[i] for i in places)] or ([configured] if configured else [])
    if len(found) != 1:
        given = ", ".join(found) or "none"
        raise UserError(
            f"serve takes one model; given: {given}. Give one directory or Hub name, and the flags "
            "of `vllm serve` before or after it"
        )
    others = [word for i, word in enumerate(rest) if i not in places and word != "--"]
    return found[0], others


def model_places(words: Sequence[str], flags: Mapping[str, Nargs]) -> list[int]:
    """The positions of the words that are neither flags nor values of flags.

    Args:
        words: of a command line.
        flags: argparse's ``nargs`` of each flag: how many values it takes.
    """
    places, last_of_several = list[int](), list[int]()
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if word == "--":
            return [*places, *range(place, len(words))]
        if not word.startswith("-"):
            places.append(place - 1)
            continue
        nargs = _nargs(word, flags)
        values = len(list(takewhile(lambda w: not w.startswith("-"), words[place:])))
        if nargs in _SEVERAL:
            if values > 1:
                last_of_several.append(place + values - 1)
        else:
            values = min(values, nargs if isinstance(nargs, int) else 1)
        place += values
    return places or [place for place in last_of_several if Path(words[place]).is_dir()]


def _nargs(word: str, flags: Mapping[str, Nargs]) -> Nargs:
    """How many values follow a flag, in any of the spellings that vLLM's parser reads."""
    if "=" in word:
        return 0
    if "." in word or word == "-O":  # --some-config.field VALUE, -O LEVEL
        return 1
    if word.startswith("--"):
        word = word.replace("_", "-")
        full = [flag for flag in flags if flag.startswith(word)]
        return flags.get(word, flags[full[0]] if full else 0)
    return flags.get(word, 0)


def serve_flags() -> dict[str, Nargs]:
    """The flags of the installed `vllm serve`, and how many values each takes.

    Raises:
        UserError: vLLM is not installed, or is a version whose parser is elsewhere.
    """
    require_vllm()
    work_around()
    try:
        from svdserve.server.plugin.command import flags_of_serve

        return flags_of_serve()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the flags of this vLLM cannot be read ({error}); give the model as the first word"
        ) from None


def require_vllm() -> None:
    """Raise UserError if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed; pip install 'svdserve[cpu]' or 'svdserve[gpu]' installs it"
        )
