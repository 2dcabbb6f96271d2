"""A guarded server as it is deployed: TLS, keys in a file, two API servers; then its end."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from playwright.sync_api import HttpCredentials

from browser import chromium
from checkpoints import write_checkpoint
from models import save_model
from servers import BIN, CHAT_TEMPLATE, NAME, Server, living_tree, running, wait_until

pytestmark = pytest.mark.vllm

KEY, OTHER, FIXED = "of-the-file-0123456789", "of-its-heir-9876543210", "of-the-environment-0000"
API_SERVERS = 2
MAX_BODY = 100_000
CLIENT = Path(__file__).with_name("openai_client.mjs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl, to make a certificate")
    folder = tmp_path_factory.mktemp("guarded")
    dense = save_model("llama", folder / "dense")
    write_checkpoint(dense, folder / "model", layout="interpolative", shared=True)
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    (folder / "keys").write_text(f"# one a line\n{KEY}\n")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", folder / "tls.key", "-out", folder / "tls.crt"),
        ],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    command: list[str | Path] = [BIN / "svdserve", "serve", folder / "model"]
    command += ["--api-keys-file", folder / "keys", "--max-body-bytes", str(MAX_BODY)]
    command += ["--chat-template", folder / "chat.jinja"]
    command += ["--ssl-keyfile", folder / "tls.key", "--ssl-certfile", folder / "tls.crt"]
    command += ["--api-server-count", str(API_SERVERS)]
    environment = {"SVDSERVE_API_KEYS": FIXED}
    certificate = folder / "tls.crt"
    with running(
        command, folder / "log", key=KEY, certificate=certificate, environment=environment
    ) as server:
        yield server


def routes(server: Server) -> list[tuple[str, str]]:
    """Method and path of every operation that the server publishes."""
    with server.http(KEY) as client:
        paths = client.get("/openapi.json").json()["paths"]
    return [
        (method.upper(), path.replace("{response_id}", "resp_0"))
        for path, item in paths.items()
        for method in item
    ]


def test_every_published_route_needs_a_key(server: Server) -> None:
    found = routes(server)
    assert {path for _, path in found} > {"/v1/completions", "/invocations", "/tokenize"}
    with server.http() as anybody, server.http("wrong-key-0123456789") as wrong:
        for method, path in found:
            expected = 200 if path in ("/health", "/ping") else 401
            for client in (anybody, wrong):
                assert client.request(method, path).status_code == expected, (method, path)
                assert client.options(path).status_code == expected or expected == 200, path


def test_a_preflight_tells_nothing(server: Server) -> None:
    preflight = {"origin": "https://page", "access-control-request-method": "GET"}
    with server.http() as anybody:
        for path in ("/metrics", "/svdserve/groups", "/v1/models"):
            assert anybody.options(path).status_code == 401
            assert "svdserve" not in anybody.options(path, headers=preflight).text
    with server.http(KEY) as client:
        assert "svdserve_keep_ratio" in client.get("/metrics").text


def test_any_of_the_keys_opens_every_api_server(server: Server) -> None:
    log = server.log.read_text()
    assert all(f"(ApiServer_{number} pid=" in log for number in range(API_SERVERS))
    for key in (KEY, FIXED):
        for _ in range(4 * API_SERVERS):  # A new connection each: the servers share them.
            with server.http(key) as client:
                assert client.get("/v1/models").status_code == 200


def test_plain_http_and_unknown_certificates_get_nothing(server: Server) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{server.port}/health")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{server.url}/health")


def test_a_browser_opens_the_dashboard_with_the_key_as_its_password(server: Server) -> None:
    if shutil.which("chromium") is None:
        pytest.skip("Chromium is not installed (Debian package chromium)")
    with chromium() as browser:
        for password, status in (("wrong-key-0123456789", 401), (KEY, 200)):
            credentials: HttpCredentials = {"username": "", "password": password}
            context = browser.new_context(ignore_https_errors=True, http_credentials=credentials)
            page = context.new_page()
            answer = page.goto(f"{server.url}/dashboard")
            assert answer
            assert answer.status == status
        page.get_by_role("status").filter(has_text="Live").wait_for(timeout=60_000)
        assert page.locator("#model").inner_text() == NAME


def test_bodies_and_prompts_have_limits(server: Server) -> None:
    with server.http(KEY) as client:
        long = {"model": NAME, "prompt": "w" * MAX_BODY}
        refused = client.post("/v1/completions", json=long)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "request_too_large"
        for prompt in ("w1 " * 3000, [5] * 300):
            refused = client.post("/v1/completions", json={"model": NAME, "prompt": prompt})
            assert refused.status_code == 400
            assert "maximum context length is 256" in refused.json()["error"]["message"]
        many = client.post("/v1/completions", json={"model": NAME, "prompt": "w1", "n": 129})
        assert many.status_code == 400
    with pytest.raises(openai.APIStatusError, match="longer than 100,000 bytes") as error:
        server.client.completions.create(**long)
    assert error.value.status_code == 413


def test_browsers_of_other_origins_get_no_permission(server: Server) -> None:
    asked = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    with server.http(KEY) as client:
        for answer in (
            client.options("/v1/completions", headers=asked),
            client.get("/v1/models", headers=asked),
        ):
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/invocations"])
def test_what_no_validator_expects_is_a_bad_request(server: Server, path: str) -> None:
    messages = [{"role": "user", "content": "w1"}]
    body = {"prompt": "w1"} if path == "/v1/completions" else {"messages": messages}
    with server.http(KEY) as client:
        answer = client.post(path, json={"model": NAME, **body, "structured_outputs": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_value"


def test_no_answer_tells_paths_or_traces(server: Server, folder: Path) -> None:
    bodies: list[dict[str, object]] = [
        {"json": {"model": NAME, "prompt": {}}},
        {"json": {"model": str(folder / "model"), "prompt": "w1"}},
        {"json": {"model": NAME, "prompt": "w1", "response_format": {"type": "regex"}}},
        {"content": b"{", "headers": {"content-type": "application/json"}},
    ]
    with server.http(KEY) as client:
        answers = [client.post("/v1/completions", **body).text for body in bodies]  # type: ignore[arg-type]
        answers += [client.get(path).text for path in ("/v1/models", "/nowhere", "/svdserve/model")]
    for answer in answers:
        # The second body's own path may come back; ours may not.
        told = answer.replace(str(folder / "model"), "", answer.count("does not exist"))
        assert str(folder) not in told
        assert "Traceback" not in told
        assert "site-packages" not in told


def test_strict_python_client(server: Server) -> None:
    request = {"model": NAME, "max_tokens": 10, "temperature": 0}
    messages = [{"role": "user", "content": "w7 w8 w9"}]
    whole = server.client.chat.completions.create(**request, messages=messages)
    chunks = list(server.client.chat.completions.create(**request, messages=messages, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert server.client.completions.create(**request, prompt="w7 w8 w9").choices[0].text
    with pytest.raises(openai.AuthenticationError, match="A valid API key"):
        server.client.with_options(api_key="none-of-them").models.list()


@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm")
def test_node_client(server: Server, folder: Path) -> None:
    place = folder / "node"
    place.mkdir()
    installed = subprocess.run(
        ["npm", "install", "--silent", "--no-audit", "--no-fund", "openai@6"],
        cwd=place,
        capture_output=True,
        text=True,
    )
    if installed.returncode:
        pytest.skip(f"npm cannot install openai: {installed.stderr.strip()[-200:]}")
    done = subprocess.run(
        ["node", CLIENT, f"{server.url}/v1", KEY, NAME],
        cwd=place,
        env={"PATH": str(Path(shutil.which("node") or "").parent)}
        | {"NODE_EXTRA_CA_CERTS": str(server.certificate)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["models"] == [NAME]
    assert got["chat"]
    assert (got["streamed"], got["finish"]) == (got["chat"], "length")
    assert got["pieces"] == got["completion"] != ""
    assert got["usage"]["completion_tokens"] == 10
    assert got["refusal"] == [401, "invalid_api_key"]
    assert got["missing"] == 404


def test_keys_are_exchanged_without_a_restart(server: Server, folder: Path) -> None:
    def statuses(key: str) -> set[int]:
        found = set()
        for _ in range(4 * API_SERVERS):
            with server.http(key) as client:
                found.add(client.get("/v1/models").status_code)
        return found

    file = folder / "keys"
    assert (statuses(KEY), statuses(OTHER)) == ({200}, {401})
    file.write_text(f"{OTHER}\n")
    wait_until(lambda: (statuses(KEY), statuses(OTHER)) == ({401}, {200}), seconds=60)
    assert statuses(FIXED) == {200}
    file.write_text(f"{KEY}\n")
    wait_until(lambda: (statuses(KEY), statuses(OTHER)) == ({200}, {401}), seconds=60)


def test_the_log_holds_no_key(server: Server) -> None:
    log = server.log.read_text()
    assert "Guard" in log  # vLLM does log its arguments.
    assert not [key for key in (KEY, OTHER, FIXED) if key in log]
    assert not [
        key
        for process in living_tree(server.process.pid)[1:]
        for key in (KEY, OTHER, FIXED)
        if key in Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
    ]


def test_sigterm_lets_streams_finish(server: Server) -> None:
    """Last of the tests of this server."""
    check_graceful_end(server)


def check_graceful_end(server: Server) -> None:
    """Streams that run get all their tokens, what comes later gets 503, and the exit is clean."""
    tokens, streams = 200, 4
    received: list[int] = []
    begun = threading.Barrier(streams + 1)

    def stream() -> None:
        pieces = server.make_client(strict=False).completions.create(
            model=NAME,
            prompt="w7 w8 w9",
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        )
        usage = None
        for number, piece in enumerate(pieces):
            if number == 0:
                begun.wait(120)
            usage = piece.usage or usage
        received.append(usage.completion_tokens if usage else 0)

    threads = [threading.Thread(target=stream) for _ in range(streams)]
    for thread in threads:
        thread.start()
    begun.wait(120)
    server.process.terminate()
    refused = None
    while refused is None and any(thread.is_alive() for thread in threads):
        with server.http(server.key) as client:
            answer = client.post("/v1/completions", json={"model": NAME, "prompt": "w1"})
        refused = answer if answer.status_code == 503 else None
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert refused is not None
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.json()["error"]["code"] == "shutting_down"
    assert received == [tokens] * streams
    assert server.process.wait(120) == 0
