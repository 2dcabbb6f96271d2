"""API keys: kept as digests, from the environment or from a file that may change while we serve.

A key has 16 or more visible ASCII characters. ``sha256:`` and the key's SHA-256 digest in
hexadecimal may be given in place of any key, so that no file needs to hold the key itself.
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from svdserve.compression.system.errors import UserError

MIN_LENGTH = 16
RECHECK_SECONDS = 1.0
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_KEY = re.compile(rf"[!-~]{{{MIN_LENGTH},}}")

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM adds handlers only to its own name


class ApiKeys:
    """The keys that are accepted now.

    Args:
        fixed: digests of the keys that do not change.
        file: one key on each line; blank lines and lines that begin with # are ignored. A request
            makes the server look at most once a second whether the file has changed, and read it
            again if it has.
        clock: seconds, monotonic.

    Raises:
        UserError: the file cannot be read, holds no key, or has a line that is not a key.
    """

    def __init__(
        self,
        fixed: Iterable[bytes] = (),
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed = frozenset(fixed)
        self._file = file
        self._clock = clock
        self._from_file: frozenset[bytes] = frozenset()
        self._signature: tuple[int, ...] | None = None
        self._checked = clock()
        if file is not None:
            self._signature = _signature(file)
            self._from_file = read_keys(file)

    @property
    def required(self) -> bool:
        """Whether requests need a key; they do if a file was given, even while it is empty."""
        return bool(self._fixed) or self._file is not None

    def accepts(self, key: bytes) -> bool:
        """Whether ``key`` is accepted, in a time that does not depend on where two keys differ."""
        self._refresh()
        digest = hashlib.sha256(key).digest()
        found = False
        for known in self._fixed | self._from_file:
            found |= hmac.compare_digest(digest, known)
        return found

    def _refresh(self) -> None:
        if self._file is None or self._clock() < self._checked + RECHECK_SECONDS:
            return
        self._checked = self._clock()
        signature = _signature(self._file)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._from_file = read_keys(self._file)
            logger.info("The file of API keys has changed: %d accepted", len(self._from_file))
        except UserError as error:
            # Keys that were removed must not stay accepted because of a mistake in the file.
            self._from_file = frozenset()
            logger.error("No key of the file is accepted until the file is corrected: %s", error)


def read_keys(file: Path) -> frozenset[bytes]:
    """The digests of a file's keys.

    Raises:
        UserError: as for ApiKeys; the message names the line, never its content.
    """
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not ASCII text"
        raise UserError(f"the file of API keys {file} cannot be read: {reason}") from None
    entries = [(f"{file}, line {n}", line.strip()) for n, line in enumerate(lines, 1)]
    digests = {digest_of(text, where) for where, text in entries if text and text[0] != "#"}
    if not digests:
        raise UserError(f"{file} holds no API key; write one key on each line")
    return frozenset(digests)


def digest_of(entry: str, where: str) -> bytes:
    """The SHA-256 digest of a key, or the digest that is given after ``sha256:``.

    Raises:
        UserError: ``entry`` is neither; the message holds ``where``, never the entry.
    """
    if match := _DIGEST.fullmatch(entry):
        return bytes.fromhex(match[1])
    if entry.startswith("sha256:") or not _KEY.fullmatch(entry):
        raise UserError(
            f"{where}: not an API key; give at least {MIN_LENGTH} visible ASCII characters without "
            "spaces (`openssl rand -hex 32` makes such a key), or sha256: and the key's digest"
        )
    return hashlib.sha256(entry.encode("ascii")).digest()


def _signature(file: Path) -> tuple[int, ...] | None:
    """Values that change with the file's content, also if a link is set to another file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev
