"""Tables and figures of `svdserve bench --served`."""

from pathlib import Path

from svdserve.bench.plots import Point, draw
from svdserve.bench.served import THROUGHPUT, LoadRatio, LoadResult, ServerResult

_FIGURES = {
    THROUGHPUT: "output tokens/s",
    "mean_ttft_ms": "TTFT mean",
    "median_ttft_ms": "P50",
    "p99_ttft_ms": "P99",
    "mean_tpot_ms": "TPOT mean",
    "median_tpot_ms": "P50",
    "p99_tpot_ms": "P99",
    "mean_itl_ms": "ITL mean",
    "median_itl_ms": "P50",
    "p99_itl_ms": "P99",
}


def markdown(result: LoadResult) -> str:
    """Two Markdown tables: the servers, and every figure over the first server's."""
    return f"{_servers(result)}\n{_ratios(result)}"


def _servers(result: LoadResult) -> str:
    first = result.servers[0]
    headings = ["server", "κ", "weights, MiB", "peak resident, MiB", "KV tokens gained"]
    headings += ["start to first token, s", f"over {first.name}"]
    rows = []
    for server in result.servers:
        starts = (r for r in result.ratios if r.name == server.name and r.workload == "start")
        seconds = sorted(server.first_token_seconds)
        rows.append(
            [
                server.name,
                f"{server.facts.keep_ratio:g}",
                f"{server.stored_bytes / 2**20:,.0f}",
                f"{server.peak_resident_bytes / 2**20:,.0f}",
                f"{result.kv_tokens_gained(server):,}",
                f"{seconds[len(seconds) // 2]:.1f}",
                next((_shown(ratio) for ratio in starts), "1"),
            ]
        )
    return _table(headings, rows)


def _ratios(result: LoadResult) -> str:
    headings = ["server", "workload", "clients", *_FIGURES.values(), "bytes or operations ratio"]
    rows = []
    for server in result.servers[1:]:
        for workload in result.options.workloads:
            for clients in result.options.concurrency:
                mine = _chosen(result, server.name, workload, clients)
                ratio = _work_ratio(result, server, workload, clients)
                shown = "-" if ratio is None else f"{ratio:.2f}"
                cells = [_shown(mine[figure]) for figure in _FIGURES]
                rows.append([server.name, workload, str(clients), *cells, shown])
    return _table(headings, rows)


def _chosen(result: LoadResult, name: str, workload: str, clients: int) -> dict[str, LoadRatio]:
    same = (name, workload, clients)
    return {r.figure: r for r in result.ratios if (r.name, r.workload, r.concurrency) == same}


def _work_ratio(
    result: LoadResult, server: ServerResult, workload: str, clients: int
) -> float | None:
    """The bytes ratio (decode) or operations ratio (prefill); None for the mixed workload."""
    first = result.servers[0]
    if workload == "decode":
        name = f"decode_{clients}"
        return server.work[name].bytes_ratio(first.work[name])
    if workload == "prefill":
        return server.work["prefill"].operations_ratio(first.work["prefill"])
    return None


def _shown(ratio: LoadRatio) -> str:
    return f"{ratio.median:.2f} ({ratio.lowest:.2f}–{ratio.highest:.2f})"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def plot(result: LoadResult, file: Path) -> None:
    """Draw output tokens per second over the first server's, a panel for each workload.

    Raises:
        UserError: matplotlib is not installed.
    """
    first, *others = result.servers
    clients = result.options.concurrency
    panels = {
        f"{workload}, by clients": {
            server.name: [_point(result, server, workload, number) for number in clients]
            for server in others
        }
        for workload in result.options.workloads
    }
    draw(panels, file, first.name, "output tokens/s over dense")


def _point(result: LoadResult, server: ServerResult, workload: str, clients: int) -> Point:
    ratio = _chosen(result, server.name, workload, clients)[THROUGHPUT]
    work_ratio = _work_ratio(result, server, workload, clients)
    return Point(str(clients), ratio.median, ratio.lowest, ratio.highest, work_ratio)
