"""The real Prometheus scrapes the real server under load, and every query finds its data.

Needs Debian's package ``prometheus`` (prometheus and promtool). Grafana itself runs nowhere here:
its dashboard is checked for what it asks of Prometheus, and for being what the generator writes.
"""

import json
import math
import re
import runpy
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from checkpoints import write_checkpoint
from models import save_model
from ports import free_port
from svdserve.bench.launch import running

DOCKER = Path(__file__).parents[2] / "docker"
CONFIG = DOCKER / "prometheus" / "prometheus.yml"
RULES = DOCKER / "prometheus" / "rules.yml"
RULE_TESTS = DOCKER / "prometheus" / "rules_test.yml"
GENERATOR = DOCKER / "grafana" / "generate.py"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "svdserve.json"
HOST = "127.0.0.1"
NAME = "pico"
KEY = "0123456789abcdef-of-the-clients"
METRICS_KEY = "0123456789abcdef-of-prometheus"
FLAGS = ("--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "64M")
DEADLINE = 180

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="Debian's package prometheus is not installed",
)

# --- What is asked ---------------------------------------------------------------------------

# What Grafana would put in for its variables.
VARIABLES = {"$__rate_interval": "1m", "$job": ".+", "$model": ".+"}
_WORDS = {"and", "or", "unless", "bool", "by", "without", "on", "ignoring", "offset"}


def panel_queries() -> dict[str, str]:
    """PromQL of every panel by the panel's and the query's name."""
    found = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            found[f"{panel['title']}, {target['refId']}"] = query
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def rule_queries() -> dict[str, str]:
    """What each rule reads: an alert's expression with every comparison answering 0 or 1.

    Asked as it stands, a healthy server's alert has no answer, whether its metrics exist or not.
    """
    found = {}
    for rule in rules():
        query = re.sub(r"absent\((.*)\)", r"\1", rule["expr"])
        found[rule.get("record") or rule["alert"]] = re.sub(
            r"(==|>=|<=|<|>)(?!\s*bool\b)", r"\1 bool", query
        )
    return found


def metric_names(promql: str) -> set[str]:
    """Names of all metrics in an expression."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', "", promql)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    words = re.findall(r"(?<![\w.:])[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)
    return set(words) - _WORDS


# --- Who is asked ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, promql: str) -> list[float]:
        """The values of an expression now.

        Raises:
            AssertionError: a metric that does not exist, or no number for an answer.
        """
        known = set(self.get("label/__name__/values"))
        unknown = metric_names(promql) - known
        assert not unknown, f"no such metric: {', '.join(sorted(unknown))}"
        series = self.get("query", query=promql)["result"]
        numbers = [float(one["value"][1]) for one in series]
        assert any(math.isfinite(number) for number in numbers), f"no data: {promql}"
        return numbers


@contextmanager
def load(url: str) -> Iterator[None]:
    """Clients that stream, that do not, and that ask for a model that is not there."""
    over = threading.Event()

    def client() -> None:
        ask = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        for number in range(100_000):
            if over.is_set():
                return
            streamed = ask.completions.create(
                model=NAME, prompt=f"request {number}", max_tokens=24, stream=True
            )
            assert sum(1 for _ in streamed) > 1
            ask.completions.create(model=NAME, prompt=f"request {number}", max_tokens=8)
            with pytest.raises(openai.NotFoundError):
                ask.completions.create(model="absent", prompt="x")
            time.sleep(0.5)  # The queries want the processor, too.

    clients = [threading.Thread(target=client) for _ in range(2)]
    for thread in clients:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in clients:
            thread.join()


def scrape_config(folder: Path, target: str) -> Path:
    """The committed configuration with this machine's files and addresses, and shorter periods."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = dict.fromkeys(config["global"], "1s")
    config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
    (scrape,) = config["scrape_configs"]
    (folder / "metrics_key").write_text(f"{METRICS_KEY}\n")
    scrape["authorization"]["credentials_file"] = str(folder / "metrics_key")
    scrape["static_configs"] = [{"targets": [target]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus beside a server whose /metrics wants a key, after some seconds of load."""
    folder = tmp_path_factory.mktemp("monitoring")
    dense = save_model("llama", folder / "dense")
    model = write_checkpoint(dense, folder / "low", layout="interpolative", shared=True)
    (folder / "api_keys").write_text(f"{KEY}\n{METRICS_KEY}\n")
    flags = (*FLAGS, "--served-model-name", NAME, "--api-keys-file", str(folder / "api_keys"))
    server_port, port = free_port(), free_port()
    with running(model, HOST, server_port, folder / "server.log", flags) as server:
        config = scrape_config(folder, f"{HOST}:{server_port}")
        with (folder / "prometheus.log").open("w") as log:
            process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address={HOST}:{port}",
                ],
                stdout=log,
                stderr=log,
            )
        prometheus = Prometheus(f"http://{HOST}:{port}")
        try:
            with load(server.url):
                wait_for_rates(prometheus)
                yield prometheus
        finally:
            process.terminate()
            process.wait()


def wait_for_rates(prometheus: Prometheus) -> None:
    """Until the recorded series that take the longest have a value."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            prometheus.values("job_model:e2e_request_latency_seconds:p95_5m > 0")
            prometheus.values("deriv(job_model:num_requests_waiting:sum[10m])")
            return
        except (AssertionError, OSError):
            if time.monotonic() > end:
                raise
            time.sleep(1)


# --- Tests -----------------------------------------------------------------------------------


@needs_prometheus
@pytest.mark.vllm
class TestUnderLoad:
    def test_the_target_is_up(self, prometheus: Prometheus) -> None:
        (target,) = prometheus.get("targets")["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")

    @pytest.mark.parametrize("query", panel_queries().values(), ids=panel_queries())
    def test_every_panel_has_data(self, prometheus: Prometheus, query: str) -> None:
        assert prometheus.values(query)

    @pytest.mark.parametrize("query", rule_queries().values(), ids=rule_queries())
    def test_every_rule_has_data(self, prometheus: Prometheus, query: str) -> None:
        assert prometheus.values(query)

    def test_every_rule_is_evaluated_without_error(self, prometheus: Prometheus) -> None:
        groups = prometheus.get("rules")["groups"]
        evaluated = [rule for group in groups for rule in group["rules"]]
        assert len(evaluated) == len(rules())
        assert {(rule["health"], rule.get("lastError")) for rule in evaluated} == {("ok", None)}
        for rule in rules():
            if "record" in rule:
                assert prometheus.values(rule["record"])

    def test_a_healthy_server_raises_no_alarm(self, prometheus: Prometheus) -> None:
        names = {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]}
        # What this machine has left, and how fast it is, is not the server's doing.
        assert names <= {"SvdserveMemoryNearLimit", "SvdserveSlowFirstToken"}

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ("sum(vllm:num_requests_waitng)", "no such metric: vllm:num_requests_waitng"),
            ("rate(svdserve_gone_total[1m]) or vector(0)", "no such metric: svdserve_gone_total"),
            ('vllm:num_requests_running{model_name="another"}', "no data"),
            ("0 * vllm:num_requests_running / 0", "no data"),
        ],
    )
    def test_a_query_without_data_fails(
        self, prometheus: Prometheus, query: str, message: str
    ) -> None:
        with pytest.raises(AssertionError, match=message):
            prometheus.values(query)


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


@needs_prometheus
def test_promtool_accepts_configuration_and_rules(tmp_path: Path) -> None:
    # The key is a file of the container's; promtool looks for it.
    for path in (scrape_config(tmp_path, "server:8000"), RULES):
        kind = "rules" if path == RULES else "config"
        done = promtool("check", kind, path)
        assert done.returncode == 0, done.stdout + done.stderr
    done = promtool("check", "config", "--syntax-only", CONFIG)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_the_alerts_pass_their_unit_tests() -> None:
    done = promtool("test", "rules", RULE_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules() if "alert" in rule])
def test_the_unit_tests_notice_an_alert_that_never_fires(alert: str, tmp_path: Path) -> None:
    document = yaml.safe_load(RULES.read_text())
    for group in document["groups"]:
        for rule in group["rules"]:
            if rule.get("alert") == alert:
                rule["expr"] = "vector(0) > 1"
    (tmp_path / RULES.name).write_text(yaml.safe_dump(document))
    shutil.copy(RULE_TESTS, tmp_path)
    done = promtool("test", "rules", tmp_path / RULE_TESTS.name)
    assert done.returncode != 0
    assert alert in done.stdout + done.stderr


def test_the_dashboard_is_what_the_generator_writes() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    assert runpy.run_path(str(GENERATOR))["as_json"]() == DASHBOARD.read_text()


def test_the_dashboard_can_be_provisioned() -> None:
    """Its panels do not overlap, have ids and names of their own, and ask a known data source."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (column, row)
        for box in (panel["gridPos"] for panel in panels)
        for column in range(box["x"], box["x"] + box["w"])
        for row in range(box["y"], box["y"] + box["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(column for column, _ in cells) < 24
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels)))
    assert used == variables | {"__rate_interval"}
