"""Sends 1,000 requests, 64 at a time; some are cancelled, malformed or too long.

    python benchmarks/reliability/reliability_load.py --model COMPRESSED --dense DENSE

These conditions must hold. There is no 5xx. Every accepted request is answered or cut off by us.
Malformed and over-long requests are refused with 4xx. The server's memory returns to its level
before the load within 2 %. Greedy answers under load equal those of the idle server as often as the
dense model's do, whose batches change the order of sums just as much (Fisher's exact test at 1 %).
vLLM's own metrics agree with the clients: it finished as many requests as were answered, and no
others but those that were cut off, and nothing is left running, waiting or in the KV cache. A first
load of the same kind is not counted, so that the KV cache has been in use before.
"""

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from reliability_client import (
    Answer,
    Request,
    Requests,
    Target,
    parse_arguments,
    send_all,
    serving,
    vocabulary_of,
    write_results,
)
from scipy.stats import fisher_exact

MEMORY_BAR = 0.02
SIGNIFICANCE = 0.01
SETTLE_SECONDS = 60
REFUSED = {"malformed", "too_long"}
IN_ENGINE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@dataclass(frozen=True)
class Metrics:
    """vLLM's counts: finished requests by reason, and what is still in its engine."""

    finished: dict[str, int]
    left: dict[str, float]


class LoadResult(BaseModel):
    """The result of one server.

    Attributes:
        statuses: the count of each HTTP status, by kind of request.
        server_errors: requests that got a 5xx or no answer.
        unanswered: accepted requests that neither ended nor were cut off by us.
        wrongly_accepted: malformed and over-long requests that were not refused.
        compared: requests that were answered in full.
        differing: those whose greedy answer is not the idle server's.
        cut_off: requests that were cut off by us.
        finished: vLLM's count of finished requests, by reason.
        left: vLLM's gauges of what is in the engine, once the work is over.
        memory_before, memory_after: resident bytes of all processes.
    """

    seconds: float
    statuses: dict[str, dict[str, int]]
    server_errors: int
    unanswered: int
    wrongly_accepted: int
    compared: int
    differing: int
    cut_off: int
    finished: dict[str, int]
    left: dict[str, float]
    memory_before: int
    memory_after: int
    examples: list[str]

    @property
    def memory_growth(self) -> float:
        return self.memory_after / self.memory_before - 1

    @property
    def counts_agree(self) -> bool:
        """Whether vLLM counted what the clients saw.

        It does not count every request that was cut off (vLLM's issue 31503), and some of them
        ended before it noticed.
        """
        ended = self.finished["stop"] + self.finished["length"]
        counted = sum(self.finished.values())
        no_others = counted == ended + self.finished["abort"]
        return no_others and self.compared <= ended and counted <= self.compared + self.cut_off


async def idle_answers(target: Target, requests: Requests) -> dict[tuple[int, ...], str]:
    """The greedy continuation of every prompt of the pool, requested one at a time."""
    asked = [Request("whole", prompt, tokens) for prompt, tokens in requests.pool]
    answers = await send_all(target, asked, concurrency=1)
    assert all(answer.complete for answer in answers), [a.error for a in answers if a.error][:3]
    return {one.prompt: answer.text for one, answer in zip(asked, answers, strict=True)}


async def load(target: Target, vocabulary: int, arguments: argparse.Namespace) -> LoadResult:
    """Load a server in two rounds of the same kind, of which the second counts."""
    requests = Requests(arguments.seed, target.max_model_len, vocabulary)
    expected = await idle_answers(target, requests)
    await send_all(target, requests.mix(arguments.requests), arguments.concurrency)
    before, counted = await settled(target), await idle(target)
    sent = requests.mix(arguments.requests)
    started = time.perf_counter()
    answers = await send_all(target, sent, arguments.concurrency)
    seconds = time.perf_counter() - started
    metrics, after = await idle(target), await settled(target, before)
    finished = {reason: n - counted.finished[reason] for reason, n in metrics.finished.items()}
    during = Metrics(finished, metrics.left)
    return judge(sent, answers, expected, during, seconds, (before, after))


async def idle(target: Target) -> Metrics:
    """vLLM's metrics once nothing is in its engine, or after long enough."""
    metrics = scrape(target)
    for _ in range(SETTLE_SECONDS):
        if not any(metrics.left.values()):
            break
        await asyncio.sleep(1)
        metrics = scrape(target)
    return metrics


def scrape(target: Target) -> Metrics:
    text = httpx.get(f"{target.url}/metrics", timeout=60).raise_for_status().text
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    values = {one.name: one.value for one in samples}
    return Metrics(
        finished={
            one.labels["finished_reason"]: int(one.value)
            for one in samples
            if one.name == "vllm:request_success_total"
        },
        left={name: values[name] for name in IN_ENGINE},
    )


async def settled(target: Target, level: int | None = None) -> int:
    """The least resident bytes after the work, measured until they are down to ``level``."""
    least = target.resident_bytes()
    for _ in range(SETTLE_SECONDS if level is not None else 5):
        await asyncio.sleep(1)
        least = min(least, target.resident_bytes())
        if level is not None and least <= level * (1 + MEMORY_BAR):
            break
    return least


def judge(
    sent: list[Request],
    answers: list[Answer],
    expected: dict[tuple[int, ...], str],
    metrics: Metrics,
    seconds: float,
    memory: tuple[int, int],
) -> LoadResult:
    """Count the answers of each kind."""
    pairs = list(zip(sent, answers, strict=True))
    statuses: dict[str, dict[str, int]] = {}
    for request, answer in pairs:
        counts = statuses.setdefault(request.kind, {})
        counts[str(answer.status)] = counts.get(str(answer.status), 0) + 1
    failed = [a for _, a in pairs if a.status == 0 or a.status >= 500]
    unanswered = [a for r, a in pairs if r.kind not in REFUSED and not a.complete]
    accepted = [a for r, a in pairs if r.kind in REFUSED and not 400 <= a.status < 500]
    greedy = [(r, a) for r, a in pairs if r.kind in ("whole", "stream") and a.complete]
    problems = [f"{a.status} {a.error}" for a in (*failed, *unanswered, *accepted)]
    return LoadResult(
        seconds=seconds,
        statuses=statuses,
        server_errors=len(failed),
        unanswered=len(unanswered),
        wrongly_accepted=len(accepted),
        compared=len(greedy),
        differing=sum(answer.text != expected[request.prompt] for request, answer in greedy),
        cut_off=sum(r.kind == "cancelled" and a.complete for r, a in pairs),
        finished=metrics.finished,
        left=metrics.left,
        memory_before=memory[0],
        memory_after=memory[1],
        examples=problems[:10],
    )


def bars(compressed: LoadResult, dense: LoadResult | None) -> dict[str, bool]:
    """Every condition, and whether it holds."""
    found = {
        "no 5xx": compressed.server_errors == 0,
        "every accepted request answered or cut off by the client": compressed.unanswered == 0,
        "malformed and over-long requests refused": compressed.wrongly_accepted == 0,
        "vLLM's counts are the clients'": compressed.counts_agree,
        "nothing left in the engine": not any(compressed.left.values()),
        "memory within 2 %": compressed.memory_growth <= MEMORY_BAR,
    }
    if dense is not None:
        table = [[one.differing, one.compared - one.differing] for one in (compressed, dense)]
        p = float(fisher_exact(table, alternative="greater").pvalue)
        found["greedy answers differ no more often than the dense model's"] = p > SIGNIFICANCE
    return found


def measure(model: Path, arguments: argparse.Namespace) -> LoadResult:
    """Serve one model and load it."""
    with serving(model, arguments.flags) as target:
        result = asyncio.run(load(target, vocabulary_of(model), arguments))
    print(
        f"{model.name}: {arguments.requests} requests in {result.seconds:.0f} s, "
        f"{result.server_errors} 5xx, {result.unanswered} unanswered, {result.wrongly_accepted} "
        f"wrongly accepted, {result.differing} of {result.compared} greedy answers differ from the "
        f"idle server's, memory {result.memory_growth:+.1%}, finished by vLLM's count "
        f"{result.finished}, left {result.left}"
    )
    return result


def main() -> int:
    """Measure and report; the exit status is 1 if a condition does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", type=Path, help="to compare greedy answers with")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    arguments = parse_arguments(parser, "reliability_load.json")
    compressed = measure(arguments.model, arguments)
    dense = measure(arguments.dense, arguments) if arguments.dense is not None else None
    reached = bars(compressed, dense)
    found: dict[str, Any] = {
        "requests": arguments.requests,
        "concurrency": arguments.concurrency,
        "compressed": compressed.model_dump(),
        "dense": dense.model_dump() if dense is not None else None,
        "bars": reached,
    }
    write_results(arguments.json, arguments.model, arguments.seed, arguments.flags, found)
    for bar, passed in reached.items():
        print(f"{bar}: {'reached' if passed else 'MISSED'}")
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
