"""Servers of pico models in processes of their own, and what tests ask of them."""

import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

from ports import free_port

BIN = Path(sys.executable).parent
NAME = "pico"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
DEADLINE = 300
START_DEADLINE = 600


@dataclass(frozen=True)
class Server:
    """A running server and clients of it; ``key`` and ``certificate`` are what a client needs."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path
    key: str = "none"
    certificate: Path | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    @property
    def client(self) -> openai.OpenAI:
        return self.make_client(strict=True)

    def make_client(self, *, strict: bool) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self.key,
            max_retries=0,
            http_client=self.http(),
            _strict_response_validation=strict,
        )

    def http(self, key: str | None = None, **options: Any) -> httpx.Client:
        """A plain client; sends no key unless one is given."""
        verify = ssl.create_default_context(cafile=self.certificate) if self.certificate else True
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(
            base_url=self.url, headers=headers, verify=verify, timeout=DEADLINE, **options
        )

    def get(self, path: str) -> str:
        with self.http() as client:
            return client.get(path).raise_for_status().text

    def gauges(self) -> dict[str, dict[str, float]]:
        """Our metrics: values by name and by the label that is not the model's name."""
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                if sample.name.startswith("svdserve_"):
                    assert sample.labels["model_name"] == NAME
                    label = sample.labels.get("kind") or sample.labels.get("process") or ""
                    found.setdefault(sample.name, {})[label] = sample.value
        return found


@contextmanager
def running(
    command: list[str | Path],
    log: Path,
    *,
    key: str = "none",
    certificate: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Server]:
    """A server, from its first healthy answer; its whole process tree ends with the context."""
    port = free_port()
    arguments = [*command, *FLAGS, "--port", str(port), "--served-model-name", NAME]
    with log.open("wb") as output:
        variables = {**os.environ, **ENVIRONMENT, **environment}
        process = subprocess.Popen(arguments, stdout=output, stderr=output, env=variables)
    server = Server(process, port, log, key, certificate)
    tree: list[psutil.Process] = []
    try:
        wait_until(lambda: healthy(server), log, START_DEADLINE)
        tree = living_tree(process.pid)
        yield server
    finally:
        # Also those whose parent has died, which no longer are in its tree.
        for child in {*tree, *living_tree(process.pid)}:
            if is_alive(child):
                child.kill()
        process.wait()


def healthy(server: Server) -> bool:
    assert server.process.poll() is None, "the server ended"
    try:
        server.get("/health")
    except httpx.HTTPError:
        return False
    return True


def wait_until(
    condition: Callable[[], bool], log: Path | None = None, seconds: float = DEADLINE
) -> None:
    """Until then or a deadline, which fails with the end of the log."""
    end = time.monotonic() + seconds
    try:
        while not condition():
            assert time.monotonic() < end, "the deadline has passed"
            time.sleep(0.3)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()[-3000:] if log else ''}") from None


def living_tree(pid: int) -> list[psutil.Process]:
    """The process and its descendants that still run."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [process for process in tree if is_alive(process)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def refusal(
    *arguments: str | Path, environment: Mapping[str, str] = MappingProxyType(ENVIRONMENT)
) -> str:
    """The one line on standard error with which `svdserve serve` refuses."""
    outcome = subprocess.run(
        [BIN / "svdserve", "serve", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    return line
