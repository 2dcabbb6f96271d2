"""Loads a server steadily for twenty minutes: its memory and latency must not grow.

    python benchmarks/reliability/reliability_soak.py --model DIR

``--concurrency`` clients each send one request after another, of the mix of reliability_load. The
run is divided into windows. The first quarter warms up (the KV cache fills). Then the median window
of the last quarter is compared with that of the second: memory must be within 2 %, latency within
10 %. A window's latency is the median of its requests', each from sending to the end and divided by
the tokens of the answer, since answers differ in length.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import cycle

import httpx
from pydantic import BaseModel
from reliability_client import (
    TIMEOUT,
    Answer,
    Request,
    Requests,
    Target,
    parse_arguments,
    send,
    serving,
    vocabulary_of,
    write_results,
)

MEMORY_BAR, LATENCY_BAR = 0.02, 0.10
LEAST_WINDOWS = 8


class Window(BaseModel):
    """The measurements of one window; seconds are those of answered requests, per token."""

    end_seconds: float
    resident_bytes: int
    requests: int
    server_errors: int
    median_token_seconds: float
    p95_token_seconds: float


async def soak(target: Target, requests: Requests, arguments: argparse.Namespace) -> list[Window]:
    """Load the server for the given time, and measure one window every ``--window`` seconds."""
    windows: list[Window] = []
    done: list[tuple[Request, Answer]] = []
    source = cycle(requests.mix(1000))
    started = time.perf_counter()
    end = started + arguments.minutes * 60

    async def ask(client: httpx.AsyncClient) -> None:
        while time.perf_counter() < end:
            request = next(source)
            done.append((request, await send(client, target.model, request)))

    async with httpx.AsyncClient(base_url=target.url, timeout=TIMEOUT) as client:
        clients = [asyncio.create_task(ask(client)) for _ in range(arguments.concurrency)]
        while time.perf_counter() < end:
            await asyncio.sleep(min(arguments.window, max(0.0, end - time.perf_counter())))
            seen = done.copy()
            done.clear()
            windows.append(summary(seen, time.perf_counter() - started, target.resident_bytes()))
            print(windows[-1].model_dump_json(), flush=True)
        await asyncio.gather(*clients)
    return windows


def summary(seen: Sequence[tuple[Request, Answer]], end: float, resident: int) -> Window:
    """Summarise the requests that ended in one window."""
    answered = [(r, a) for r, a in seen if r.kind in ("whole", "stream") and a.complete]
    times = sorted(a.seconds / r.tokens for r, a in answered) or [0.0]
    return Window(
        end_seconds=end,
        resident_bytes=resident,
        requests=len(seen),
        server_errors=sum(a.status == 0 or a.status >= 500 for _, a in seen),
        median_token_seconds=statistics.median(times),
        p95_token_seconds=times[min(len(times) - 1, int(0.95 * len(times)))],
    )


def drift(values: Sequence[float]) -> float:
    """Relative change from the median of the second quarter to that of the last."""
    quarter = len(values) // 4
    early = statistics.median(values[quarter : 2 * quarter])
    return statistics.median(values[-quarter:]) / early - 1


def main() -> int:
    """Measure and report; the exit status is 1 if a condition does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--window", type=float, default=15, help="seconds")
    parser.add_argument("--concurrency", type=int, default=4)
    arguments = parse_arguments(parser, "reliability_soak.json")
    if arguments.minutes * 60 < LEAST_WINDOWS * arguments.window:
        parser.error(f"--minutes must hold at least {LEAST_WINDOWS} windows of --window seconds")
    with serving(arguments.model, arguments.flags) as target:
        mix = Requests(arguments.seed, target.max_model_len, vocabulary_of(arguments.model))
        windows = asyncio.run(soak(target, mix, arguments))
    memory = drift([window.resident_bytes for window in windows])
    latency = drift([window.median_token_seconds for window in windows])
    errors = sum(window.server_errors for window in windows)
    bars = {
        "no 5xx": errors == 0,
        "memory within 2 %": memory <= MEMORY_BAR,
        "median latency within 10 %": latency <= LATENCY_BAR,
    }
    found = {
        "minutes": arguments.minutes,
        "concurrency": arguments.concurrency,
        "requests": sum(window.requests for window in windows),
        "server_errors": errors,
        "memory_drift": memory,
        "latency_drift": latency,
        "bars": bars,
        "windows": [window.model_dump() for window in windows],
    }
    write_results(arguments.json, arguments.model, arguments.seed, arguments.flags, found)
    print(f"{errors} 5xx, memory {memory:+.1%}, median latency {latency:+.1%}")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
