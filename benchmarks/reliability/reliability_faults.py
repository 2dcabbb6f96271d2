"""What clients see of a server under load that gets SIGTERM, and of one whose engine is killed.

    python benchmarks/reliability/reliability_faults.py --model DIR

Every round has ``--streams`` streams in flight. On SIGTERM they must all complete, later requests
must get 503 and Retry-After, and the server must exit with 0. When the engine is killed, /health
must answer 503, no stream may hang, and the server must exit with another status than 0 within 10
seconds; a server that is then started, as a supervisor would, must answer.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import psutil
from pydantic import BaseModel
from reliability_client import (
    TIMEOUT,
    Answer,
    Request,
    Target,
    parse_arguments,
    send,
    serving,
    vocabulary_of,
    write_results,
)
from reliability_load import scrape

EXIT_BAR_SECONDS = 10
WAIT_SECONDS = 120
HEALTH, COMPLETIONS = "/health", "/v1/completions"
RUNNING = "vllm:num_requests_running"


class Fault(BaseModel):
    """The result of one round.

    Attributes:
        in_flight: the number of streams at the fault.
        completed: how many of them ended completely.
        refused: later requests that got 503, with Retry-After if they asked for tokens.
        otherwise: later requests that got any other answer.
        first_503_seconds: from the fault to the first 503; None if there was none.
        exit_code, exit_seconds: of the server; the code is None if it did not end.
        restarted: whether the next server answered; None if none was started.
    """

    in_flight: int
    completed: int
    refused: int
    otherwise: int
    first_503_seconds: float | None
    exit_code: int | None
    exit_seconds: float
    restarted: bool | None = None


@dataclass
class Later:
    """The answers to requests after the fault."""

    refused: int = 0
    otherwise: int = 0
    first: float | None = None
    began: float = field(default_factory=time.perf_counter)

    def add(self, response: httpx.Response) -> None:
        health = response.request.url.path == HEALTH
        if response.status_code == 503 and (health or "retry-after" in response.headers):
            self.refused += 1
            self.first = self.first or round(time.perf_counter() - self.began, 2)
        else:
            self.otherwise += 1


async def strike(
    target: Target, arguments: argparse.Namespace, fault: Callable[[], None], route: str
) -> Fault:
    """Load the server, cause ``fault``, and send requests to ``route`` until the server ends."""
    source, vocabulary = random.Random(arguments.seed), vocabulary_of(arguments.model)
    prompts = [source.choices(range(260, vocabulary - 20), k=16) for _ in range(arguments.streams)]
    requests = [Request("stream", tuple(prompt), arguments.tokens) for prompt in prompts]
    async with httpx.AsyncClient(base_url=target.url, timeout=TIMEOUT) as client:
        sent = [asyncio.create_task(send(client, target.model, one)) for one in requests]
        while scrape(target).left[RUNNING] < len(sent):
            if any(task.done() for task in sent):
                raise RuntimeError("a stream ended before all had begun; give more --tokens")
            await asyncio.sleep(0.05)
        fault()
        later, server = Later(), psutil.Process(target.pid)
        code = None
        while code is None and time.perf_counter() < later.began + WAIT_SECONDS:
            with contextlib.suppress(httpx.TransportError):  # the server no longer listens
                later.add(await ask(client, target.model, route))
            with contextlib.suppress(psutil.TimeoutExpired):
                code = await asyncio.to_thread(server.wait, 0.1)
        seconds = round(time.perf_counter() - later.began, 2)
        answers: list[Answer] = await asyncio.gather(*sent)
    return Fault(
        in_flight=len(sent),
        completed=sum(answer.complete for answer in answers),
        refused=later.refused,
        otherwise=later.otherwise,
        first_503_seconds=later.first,
        exit_code=code,
        exit_seconds=seconds,
    )


async def ask(client: httpx.AsyncClient, model: str, route: str) -> httpx.Response:
    if route == HEALTH:
        return await client.get(route)
    return await client.post(route, json={"model": model, "prompt": [300], "max_tokens": 1})


def sigterm(arguments: argparse.Namespace) -> Fault:
    with serving(arguments.model, arguments.flags) as target:
        terminate = psutil.Process(target.pid).terminate
        return asyncio.run(strike(target, arguments, terminate, COMPLETIONS))


def engine_killed(arguments: argparse.Namespace) -> Fault:
    with serving(arguments.model, arguments.flags) as target:
        below = psutil.Process(target.pid).children(recursive=True)
        (engine,) = (process for process in below if "EngineCore" in process.name())
        found = asyncio.run(strike(target, arguments, engine.kill, HEALTH))
    with serving(arguments.model, arguments.flags) as target:
        body = {"model": target.model, "prompt": [300], "max_tokens": 1}
        answer = httpx.post(f"{target.url}{COMPLETIONS}", json=body, timeout=TIMEOUT)
    return found.model_copy(update={"restarted": answer.is_success})


def bars(ended: list[Fault], killed: list[Fault]) -> dict[str, bool]:
    """Every condition, and whether it holds in all rounds."""
    limit = EXIT_BAR_SECONDS
    return {
        "SIGTERM: every stream under way ends in full": all(
            one.completed == one.in_flight for one in ended
        ),
        "SIGTERM: whoever comes later gets 503 and Retry-After": all(
            one.refused and not one.otherwise for one in ended
        ),
        "SIGTERM: the server exits with 0": all(one.exit_code == 0 for one in ended),
        "engine killed: /health says 503": all(one.refused for one in killed),
        f"engine killed: the server exits with a failure within {limit} s": all(
            one.exit_code not in (0, None) and one.exit_seconds <= limit for one in killed
        ),
        "engine killed: the next server answers": all(one.restarted for one in killed),
    }


def main() -> int:
    """Measure and report; the exit status is 1 if a condition does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each stream")
    arguments = parse_arguments(parser, "reliability_faults.json")
    rounds = range(arguments.rounds)
    ended = [sigterm(arguments) for _ in rounds]
    killed = [engine_killed(arguments) for _ in rounds]
    held = bars(ended, killed)
    found = {
        "sigterm": [one.model_dump(exclude_none=True) for one in ended],
        "engine_killed": [one.model_dump() for one in killed],
        "bars": held,
    }
    write_results(arguments.json, arguments.model, arguments.seed, arguments.flags, found)
    for name, holds in held.items():
        print(f"{'held' if holds else 'MISSED'}: {name}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
