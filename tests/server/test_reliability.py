"""What happens when things go wrong: generated requests, overload, and a dead engine."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from checkpoints import write_checkpoint
from models import save_model
from servers import (
    BIN,
    CHAT_TEMPLATE,
    ENVIRONMENT,
    Server,
    is_alive,
    living_tree,
    refusal,
    running,
    wait_until,
)

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
OPENAI = ROOT.parent / "shared" / "data" / "openapi.json"
GENERATING = (
    *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/invocations"),
    *("/v1/responses", "/v1/messages", "/generative_scoring"),
)
FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reliability")
    dense = save_model("llama", folder / "dense")
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    return write_checkpoint(dense, folder / "model", layout="interpolative", shared=True)


def command(model: Path) -> list[str | Path]:
    template = model.parent / "chat.jinja"
    return [BIN / "svdserve", "serve", model, "--chat-template", template]


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with running(command(model), model.parent / "log") as server:
        yield server


@pytest.mark.exhaustive
def test_generated_requests_get_no_5xx(server: Server, model: Path, tmp_path: Path) -> None:
    """A few of what benchmarks/reliability/reliability_fuzz.py sends by thousands."""
    pytest.importorskip("schemathesis")
    result = tmp_path / "fuzz.json"
    documents = ["--openai", OPENAI] if OPENAI.exists() else []
    done = subprocess.run(
        [
            *(
                sys.executable,
                ROOT / "benchmarks" / "reliability" / "reliability_fuzz.py",
                "--model",
                model,
            ),
            *("--url", server.url, "--cases", "200", "--json", result, *documents),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads(result.read_text())
    assert found["cases"] >= 200
    statuses = found["statuses"]["server"]
    # So few cases do not get through to the model on every route.
    answered = [path for path in GENERATING if "200" in statuses[f"POST {path}"]]
    refused = [path for path in GENERATING if "400" in statuses[f"POST {path}"]]
    assert len(answered) > len(GENERATING) / 2
    assert len(refused) > len(GENERATING) / 2
    assert httpx.get(f"{server.url}/health").status_code == 200


REFUSAL = {"type": "refusal", "refusal": "no"}


@pytest.mark.parametrize("content", [[], [REFUSAL]], ids=["empty", "refusal"])
def test_messages_that_vllm_cannot_convert(server: Server, content: list[dict[str, str]]) -> None:
    message = {"type": "message", "id": "m", "role": "assistant", "status": "completed"}
    body = {"model": "pico", "input": [message | {"content": content}], "max_output_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_engine_is_killed(server: Server) -> None:
    """Last of the tests of this server: it says so, ends with a failure, and another can start."""
    tree = living_tree(server.process.pid)
    (engine,) = [process for process in tree if "EngineCore" in process.name()]
    engine.kill()
    killed = time.monotonic()
    statuses: set[int] = set()
    while server.process.poll() is None and time.monotonic() < killed + 10:
        with contextlib.suppress(httpx.HTTPError):
            statuses.add(httpx.get(f"{server.url}/health", timeout=5).status_code)
        time.sleep(0.1)
    assert 503 in statuses
    assert server.process.returncode == 1
    assert "The engine process has died" in server.log.read_text()
    wait_until(lambda: not any(is_alive(process) for process in tree))


@pytest.mark.exhaustive
def test_load_with_cancelled_and_bad_requests(model: Path, tmp_path: Path) -> None:
    """reliability_load.py in small; a fresh server, so also what a supervisor restarts.

    Its bar for memory is for a long run: a pico server's first requests still fill its caches.
    """
    result = tmp_path / "load.json"
    done = subprocess.run(
        [
            *(
                sys.executable,
                ROOT / "benchmarks" / "reliability" / "reliability_load.py",
                "--model",
                model,
            ),
            *("--requests", "100", "--concurrency", "16", "--json", result, "--", *FLAGS),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    found = json.loads(result.read_text()) if result.exists() else {}
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    missed = {bar for bar, reached in found["bars"].items() if not reached}
    assert missed <= {"memory within 2 %"}, found["compressed"]["examples"]
    statuses = found["compressed"]["statuses"]
    assert set(statuses["too_long"]) == {"400"}
    assert set(statuses["malformed"]) <= {"400", "404", "415"}


def test_too_little_memory_for_vllm_ends_in_one_line(model: Path) -> None:
    """What our own check leaves to vLLM: it plans with all of the machine's memory, which is taken.

    The last line says where to look, and vLLM's error above it has the bytes.
    """
    arguments = [*command(model), *FLAGS, "--port", "0", "--gpu-memory-utilization", "1.0"]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": ""}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    log = done.stdout + done.stderr
    assert "is less than desired CPU memory utilization" in log
    last = [line for line in done.stderr.splitlines() if line.startswith("error: ")][-1]
    assert "--gpu-memory-utilization" in last


def test_a_bad_file_of_keys_is_refused_before_the_start(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("short\n")
    line = refusal(model, "--port", "0", "--api-keys-file", file)
    assert f"{file}, line 1" in line
    assert "short" not in line
