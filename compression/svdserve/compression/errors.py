"""The exceptions that a user is meant to read."""


class UserError(ValueError):
    """Bad input: one line that says what was given, what is allowed and what to do.

    The command line prints it without a traceback and exits with code 2. Names out of untrusted
    files may be part of it, so what a terminal would interpret is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(map(_printable, message)))


def _printable(character: str) -> str:
    if character.isprintable() or character == "\n":
        return character
    return character.encode("unicode_escape").decode("ascii")
