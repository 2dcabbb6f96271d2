"""Times of GPU work: CUDA graphs, rotated weights, medians of interleaved rounds."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
# Together the weights that a graph reads are more than any L2 cache, so each is read from memory.
NO_CACHE_HOLDS = 256 << 20  # bytes


def copies(stored_bytes: int, dry: bool) -> int:
    """How many copies of a layer no cache holds."""
    return 2 if dry else max(2, min(-(-NO_CACHE_HOLDS // stored_bytes), 64))


def graph_of(calls: Sequence[Call]) -> Callable[[], float]:
    """A function that runs all calls and gives the seconds of one: a CUDA graph where there is one.

    Args:
        calls: at least one; each with its own weights.
    """
    if not torch.cuda.is_available():

        def run() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / len(kept)

    return replay


def medians(contenders: dict[str, Sequence[Call]], rounds: int) -> dict[str, float]:
    """Median seconds of a call of each contender; they take turns, forwards and backwards."""
    graphs = {name: graph_of(calls) for name, calls in contenders.items()}
    for run in graphs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for index in range(rounds):
        for name in list(graphs) if index % 2 == 0 else reversed(graphs):
            seconds[name].append(graphs[name]())
    return {name: statistics.median(values) for name, values in seconds.items()}
