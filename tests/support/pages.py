"""Pages of documentation as scripts: what their blocks run, and which options their commands have.

Conventions, for whoever writes a page (docs/README.md repeats them):

* ```` ```bash ```` and ```` ```python ```` blocks run from top to bottom in a folder that holds
  ``models/smollm2`` (a dense model), ``models/small`` (compressed, unless the page makes it itself)
  and ``text.txt``. The models are tiny stand-ins.
* ``<!-- not run: REASON -->`` before a block: only its options are checked.
* ``<!-- file: NAME -->`` before a block of any language: it is written to NAME.
* ``svdserve serve`` and ``vllm serve`` go to the background, without compilation; the next command
  runs when the server is healthy. A second one takes the place of the first. Port 8000 stands for a
  free one.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^( *)```(\w*) *$")
_NOTE = re.compile(r"^ *<!-- (not run|file): *(.+?) *-->$")
_NOTHING = re.compile(r"^ *(<!--.*-->)? *$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the note before it, and the line where it begins."""

    page: Path
    line: int
    language: str
    text: str
    note: str = ""
    value: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.note

    def commands(self) -> Iterator[list[str]]:
        """The simple commands of a bash block, as words."""
        if self.language != "bash":
            return
        for line in self.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word and set(word) <= set(";&|()<>"):
                    if words:
                        yield words
                    words = []
                else:
                    words.append(word)


ELSEWHERE = ("docker/README.md", "compression/svdserve/compression/format/FORMAT.md")


def pages() -> list[Path]:
    """README.md, every page of docs/, and those that lie beside what they are about."""
    docs = sorted((ROOT / "docs").glob("*.md"))
    return [ROOT / "README.md", *docs, *(ROOT / page for page in ELSEWHERE)]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page.

    Raises:
        ValueError: a block does not end, or a note stands before no block.
    """
    found: list[Block] = []
    note, inside = ("", ""), None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if inside is not None:
            indent, language, start, lines = inside
            if fence and not fence[2]:
                text = "".join(f"{one.removeprefix(indent)}\n" for one in lines)
                found.append(Block(page, start, language, text, *note))
                note, inside = ("", ""), None
            else:
                lines.append(line)
        elif fence:
            inside = (fence[1], fence[2], number, [])
        elif told := _NOTE.match(line):
            note = (told[1], told[2])
        elif note[0] and not _NOTHING.match(line):
            raise ValueError(f"{page.name}:{number}: the note {note[0]!r} stands before no block")
    if inside is not None:
        raise ValueError(f"{page.name}:{inside[2]}: the block does not end")
    return found


_PREAMBLE = r"""
set -euo pipefail
_server=
_stop() {
  if [ -n "$_server" ]; then kill "$_server" 2>/dev/null || true; wait "$_server" || true; fi
  _server=
}
trap _stop EXIT
_healthy() (
  exec 3<>/dev/tcp/127.0.0.1/8000 && printf 'GET /health HTTP/1.0\r\n\r\n' >&3 &&
    read -r _ status _ <&3 && [ "$status" = 200 ]
) 2>/dev/null
_serve() {
  _stop
  "$@" > server.log 2>&1 &
  _server=$!
  until _healthy; do
    kill -0 "$_server" 2>/dev/null || { tail -n 40 server.log >&2; exit 1; }
    sleep 0.5
  done
}
"""


def script(page: Path, port: int) -> str:
    """One bash script of all blocks that run; "" if there are none."""
    parts = []
    for number, block in enumerate(blocks(page)):
        if not block.runs and block.note != "file":
            continue
        parts.append(f"echo {shlex.quote(f'--- {block.place}')} >&2\n")
        name = block.value if block.note == "file" else f"block{number}.py"
        if block.note == "file" or block.language == "python":
            parts.append(f"cat > {shlex.quote(name)} <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK\n")
        if block.runs:
            parts.append(f"python {name}\n" if block.language == "python" else _bash(block.text))
    if not any(block.runs for block in blocks(page)):
        return ""
    return re.sub(r"\b8000\b", str(port), _PREAMBLE + "".join(parts))


def _bash(text: str) -> str:
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        program = next((i for i, word in enumerate(words) if "=" not in word), 0)
        if words[program : program + 2] in (["svdserve", "serve"], ["vllm", "serve"]):
            rest = [word for word in words if word != "&"]
            flags = [] if "--port" in rest else ["--port", "8000"]
            lines.append(shlex.join(["_serve", "env", *rest, *flags, "--enforce-eager"]))
        else:
            lines.append(line)
    return "".join(f"{line}\n" for line in lines)
