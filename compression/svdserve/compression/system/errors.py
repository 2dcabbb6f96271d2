"""The exceptions that a user is meant to read."""

from pydantic import ValidationError


class UserError(ValueError):
    """Bad input: one line that says what was given, what is allowed and what to do.

    The command line prints the message without a traceback and exits with code 2. The message may
    contain names from untrusted files, so characters that a terminal would interpret are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(map(_printable, message)))


def _printable(character: str) -> str:
    if character.isprintable() or character == "\n":
        return character
    return character.encode("unicode_escape").decode("ascii")


def explain(error: ValidationError) -> str:
    """One line for pydantic's first error: the field, the problem and the given value."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    name = ".".join(str(part) for part in first["loc"])
    if not name:  # a validator of the whole model failed, whose input is too long to print
        return str(cause or first["msg"])
    given = "" if isinstance(first["input"], dict) else f" (given: {_short(first['input'])})"
    return f"{name}: {first['msg']}{given}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
