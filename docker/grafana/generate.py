"""This script holds the Grafana dashboard as code and writes it into dashboards/.

Run ``python docker/grafana/generate.py`` after a change, and never edit the JSON that Grafana
reads. tests/docker checks that a running server has every series that the dashboard draws.
"""

from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DataSourceRef,
    DynamicConfigValue,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TARGET = Path(__file__).with_name("dashboards") / "svdserve.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
MODEL = '{job=~"$job", model_name=~"$model"}'  # vLLM's series and ours
HTTP = '{job=~"$job"}'  # the HTTP server's, which name no model
HTTP_5XX = '{job=~"$job", status="5xx"}'
WINDOW = "[$__rate_interval]"
THIRD, EIGHTH = 8, 3  # of Grafana's 24 columns

Query = tuple[str, str]
"""A query holds its PromQL and its legend."""


def percentiles(histogram: str) -> list[Query]:
    """Ask for the median and the 95th and 99th percentile over all chosen servers."""
    rates = f"sum by (le) (rate({histogram}_bucket{MODEL}{WINDOW}))"
    return [(f"histogram_quantile({q}, {rates})", f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)]


def rate(counter: str, labels: str = MODEL, by: str = "") -> str:
    """Ask for events per second, with one series for every value of the label ``by``."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({counter}{labels}{WINDOW}))"


def lines(
    title: str, unit: str, queries: Iterable[Query], description: str, limit: str = ""
) -> timeseries.Panel:
    """Draw values over time; if ``limit`` names a series, the others are stacked below it."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .span(THIRD)
        .height(8)
        .legend(common.VizLegendOptions().show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if limit:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
        panel.fill_opacity(30)
        apart = {"stacking": {"mode": "none"}, "fillOpacity": 0, "lineStyle": {"fill": "dash"}}
        panel.override_by_name(
            limit, [DynamicConfigValue(f"custom.{name}", value) for name, value in apart.items()]
        )
    for query in _queries(queries):
        panel.with_target(query)
    return panel


def number(title: str, unit: str, promql: str, description: str) -> stat.Panel:
    """Show the present value of one query."""
    (query,) = _queries([(promql, title)])
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(EIGHTH)
        .height(4)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(query)
    )


def labels(title: str, promql: str, description: str) -> table.Panel:
    """List the labels of an info metric, with a row for each server."""
    (query,) = _queries([(promql, title)])
    return (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(2 * THIRD)
        .height(8)
        .with_target(query.format(PromQueryFormat.TABLE).instant())
    )


def _queries(queries: Iterable[Query]) -> Iterator[prometheus.Dataquery]:
    for letter, (promql, legend) in zip("ABCDEFGH", queries, strict=False):
        query = prometheus.Dataquery().ref_id(letter).datasource(SOURCE).expr(promql)
        yield query.legend_format(legend)


SECTIONS: dict[str, list[stat.Panel | timeseries.Panel | table.Panel]] = {
    "Now": [
        number("Servers up", units.Short, f"sum(up{HTTP})", "Targets that answer."),
        number(
            "Requests", units.RequestsPerSecond, rate("http_requests_total", HTTP), "All routes."
        ),
        number(
            "Server errors",
            units.PercentUnit,
            f"({rate('http_requests_total', HTTP_5XX)} or vector(0))"
            f" / {rate('http_requests_total', HTTP)}",
            "5xx of all answers.",
        ),
        number(
            "Generation",
            units.CountsPerSecond,
            f"sum(svdserve_generation_tokens_per_second{MODEL})",
            "Tokens per second over the last 10 seconds.",
        ),
        number(
            "TTFT, p95",
            units.Seconds,
            percentiles("vllm:time_to_first_token_seconds")[1][0],
            "95th percentile of the time to the first token.",
        ),
        number(
            "KV cache",
            units.PercentUnit,
            f"max(vllm:kv_cache_usage_perc{MODEL})",
            "Use of the fullest KV cache.",
        ),
        number(
            "Memory",
            units.PercentUnit,
            f"max(instance:svdserve_memory:ratio{MODEL})",
            "Of what the fullest server could have.",
        ),
        number(
            "Weights of dense",
            units.PercentUnit,
            f"sum(svdserve_weights_bytes{MODEL}) / sum(svdserve_dense_equivalent_bytes{MODEL})",
            "Stored bytes of all weights over those of the dense model.",
        ),
    ],
    "Latency": [
        lines(
            "Time to first token",
            units.Seconds,
            percentiles("vllm:time_to_first_token_seconds"),
            "From a request's arrival to its first token; vLLM's histogram.",
        ),
        lines(
            "Inter-token latency",
            units.Seconds,
            percentiles("vllm:inter_token_latency_seconds"),
            "Between two tokens of a request; vLLM's histogram.",
        ),
        lines(
            "End-to-end latency",
            units.Seconds,
            percentiles("vllm:e2e_request_latency_seconds"),
            "From a request's arrival to its last token; vLLM's histogram.",
        ),
    ],
    "Load": [
        lines(
            "Tokens",
            units.CountsPerSecond,
            [
                (rate("vllm:prompt_tokens_total"), "prompt"),
                (rate("vllm:generation_tokens_total"), "generation"),
            ],
            "Tokens per second.",
        ),
        lines(
            "Requests in the engine",
            units.Short,
            [
                (f"sum(vllm:num_requests_running{MODEL})", "running"),
                (f"sum(vllm:num_requests_waiting{MODEL})", "waiting"),
            ],
            "Waiting ones have no room in the batch or in the KV cache.",
        ),
        lines(
            "Time in the queue",
            units.Seconds,
            percentiles("vllm:request_queue_time_seconds"),
            "Before the engine took a request; vLLM's histogram.",
        ),
    ],
    "Memory": [
        lines(
            "Weights",
            units.BytesIEC,
            [
                (f"sum by (kind) (svdserve_weights_bytes{MODEL})", "{{kind}}"),
                (f"sum(svdserve_dense_equivalent_bytes{MODEL})", "dense model"),
            ],
            "Stored bytes of all chosen servers' weights; dashed: if all were dense.",
            limit="dense model",
        ),
        lines(
            "Processes",
            units.BytesIEC,
            [
                (f"sum by (process) (svdserve_process_resident_bytes{MODEL})", "{{process}}"),
                (
                    f"sum(svdserve_process_resident_bytes{MODEL})"
                    f" + sum(svdserve_memory_available_bytes{MODEL})",
                    "limit",
                ),
            ],
            "Resident memory; dashed: with what the control group or the machine still has.",
            limit="limit",
        ),
        lines(
            "KV cache",
            units.BytesIEC,
            [
                (
                    "sum by (instance) (svdserve_kv_cache_bytes{M})"
                    " * avg by (instance) (vllm:kv_cache_usage_perc{M})".replace("{M}", MODEL),
                    "used, {{instance}}",
                ),
                (f"sum by (instance) (svdserve_kv_cache_bytes{MODEL})", "all, {{instance}}"),
            ],
            "Memory of the KV cache on all workers, and the share of it that requests hold.",
        ),
    ],
    "Requests": [
        lines(
            "Outcomes",
            units.RequestsPerSecond,
            [(rate("vllm:request_success_total", by="finished_reason"), "{{finished_reason}}")],
            "Why the engine ended requests: abort is a client that left, error is a failure.",
        ),
        lines(
            "HTTP answers",
            units.RequestsPerSecond,
            [(rate("http_requests_total", HTTP, by="status"), "{{status}}")],
            "By status, all routes.",
        ),
        lines(
            "Preemptions",
            units.EventsPerSecond,
            [(rate("vllm:num_preemptions_total"), "preemptions")],
            "Requests that lost their place in a full KV cache and were computed again.",
        ),
    ],
    "Compression": [
        labels(
            "Models",
            f"max by (instance, model_name, base_model, method, layout, format_version)"
            f" (svdserve_model_info{MODEL})",
            "What is served, and how it was made.",
        ),
        lines(
            "Keep ratio",
            units.PercentUnit,
            [(f"max by (model_name) (svdserve_keep_ratio{MODEL})", "{{model_name}}")],
            "Stored over dense parameters of the factored linears.",
        ),
    ],
}


def build() -> Dashboard:
    """Build the whole dashboard."""
    dashboard = (
        dashboards.Dashboard("svdserve")
        .uid("svdserve")
        .description("Latency, load, memory and compression of svdserve servers.")
        .tags(["svdserve", "vllm"])
        .readonly()
        .refresh("15s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboards.DatasourceVariable("datasource").type("prometheus"))
    )
    for name, query in (
        ("job", "label_values(svdserve_model_info, job)"),
        ("model", 'label_values(svdserve_model_info{job=~"$job"}, model_name)'),
    ):
        dashboard.with_variable(
            dashboards.QueryVariable(name)
            .label(name.capitalize())
            .query(query)
            .datasource(SOURCE)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".+")
        )
    numbers = count(1)
    for name, panels in SECTIONS.items():
        dashboard.with_row(dashboards.Row(name).id(next(numbers)))
        for panel in panels:
            dashboard.with_panel(panel.id(next(numbers)))
    return dashboard.build()


def as_json() -> str:
    """Return the text of the file that Grafana reads."""
    return JSONEncoder(sort_keys=True, indent=2).encode(build()) + "\n"


if __name__ == "__main__":
    TARGET.write_text(as_json())
