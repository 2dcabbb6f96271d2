"""Keys, the middleware in front of a small application, and what is checked before vLLM starts."""

import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from svdserve.compression.system.errors import UserError
from svdserve.server.http.keys import RECHECK_SECONDS, ApiKeys, read_keys
from svdserve.server.http.security import Guard, SecurityOptions
from svdserve.server.serve import server_arguments, take_keys

FIRST, SECOND = "first-key-0123456789", "second-key-9876543210"


def sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{FIRST}\n\n  sha256:{sha256(SECOND).hex()}\r\n")
    keys = ApiKeys(file=file)
    assert keys.required
    assert keys.accepts(FIRST.encode())
    assert keys.accepts(SECOND.encode())
    for other in ("", FIRST[:-1], FIRST + "x", "# of the team", sha256(FIRST).hex()):
        assert not keys.accepts(other.encode())


def test_no_keys_are_not_required() -> None:
    assert not ApiKeys().required


@pytest.mark.parametrize(
    "line", ["too-short", "with a space 0123456789", "ключ-0123456789-0123", "sha256:00ff"]
)
def test_what_is_no_key_is_refused_without_being_told(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{FIRST}\n{line}\n")
    with pytest.raises(UserError, match=str(file)) as refused:
        read_keys(file)
    assert line not in str(refused.value)
    with pytest.raises(UserError, match="SVDSERVE_API_KEYS") as refused:
        SecurityOptions.from_environment({"SVDSERVE_API_KEYS": line})
    assert line not in str(refused.value)


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        ApiKeys(file=tmp_path / "absent")
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(UserError, match="no API key"):
        ApiKeys(file=tmp_path / "empty")


def test_keys_are_exchanged_while_in_use(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text(FIRST)
    keys = ApiKeys([sha256("a-fixed-key-0123456789")], file, clock)

    def accepted() -> list[str]:
        clock.now += RECHECK_SECONDS
        known = (FIRST, SECOND, "a-fixed-key-0123456789")
        return [key for key in known if keys.accepts(key.encode())]

    assert accepted() == [FIRST, "a-fixed-key-0123456789"]
    file.write_text(f"{FIRST}\n{SECOND}\n")
    assert accepted() == [FIRST, SECOND, "a-fixed-key-0123456789"]
    # As Kubernetes exchanges a mounted secret: a link is turned, and its target may look the same.
    other = tmp_path / "other"
    other.write_text(f"{SECOND}\n")
    link = tmp_path / "link"
    link.symlink_to(other)
    link.replace(file)
    assert accepted() == [SECOND, "a-fixed-key-0123456789"]
    # A mistake must not keep a withdrawn key alive.
    other.write_text("oops\n")
    assert accepted() == ["a-fixed-key-0123456789"]
    file.unlink()
    assert accepted() == ["a-fixed-key-0123456789"]
    file.write_text(f"{FIRST}\n")
    assert accepted() == [FIRST, "a-fixed-key-0123456789"]


def test_the_environment_carries_the_options_but_no_key(tmp_path: Path) -> None:
    options = SecurityOptions.from_environment(
        {
            "SVDSERVE_API_KEYS": f"{FIRST}, {SECOND}",
            "SVDSERVE_API_KEYS_FILE": str(tmp_path / "keys"),
            "SVDSERVE_METRICS_AUTH": "none",
            "SVDSERVE_MAX_BODY_BYTES": "1000",
        }
    )
    assert options.api_keys == {sha256(FIRST), sha256(SECOND)}
    assert (options.metrics_auth, options.max_body_bytes) == ("none", 1000)
    variables = options.to_environment()
    assert SecurityOptions.from_environment(variables) == options
    assert not any(key in value for value in variables.values() for key in (FIRST, SECOND))


def test_keys_for_vllm_become_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", SECOND)
    flags = ["--api-key", FIRST, "another-key-000000", "--port", "1", f"--api_key={FIRST}x"]
    options, others = take_keys(SecurityOptions(), flags)
    given = {FIRST, SECOND, "another-key-000000", f"{FIRST}x"}
    assert options.api_keys == {sha256(key) for key in given}
    assert others == ["--port", "1"]


def application() -> FastAPI:
    """Answers every path with how many bytes it got; the paths of events in pieces."""
    app = FastAPI(openapi_url=None)

    @app.get("/events")
    async def events() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            for number in range(3):
                yield f"data: {number}\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def anything(path: str, request: Request) -> dict[str, object]:
        return {"path": path, "bytes": len(await request.body())}

    return app


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guard:
    monkeypatch.setenv("SVDSERVE_API_KEYS", f"{FIRST},{SECOND}")
    monkeypatch.setenv("SVDSERVE_MAX_BODY_BYTES", "1000")
    return Guard(application())


def ask(app: Guard, method: str, path: str, **options: object) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            return await client.request(method, path, **options)  # type: ignore[arg-type]

    return anyio.run(send)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


GUARDED = (
    "/v1/models",
    "/V1/models",
    "/invocations",
    "/tokenize",
    "/scale_elastic_ep",
    "/docs",
    "/events",
    "/health/../v1/models",
    "//health",
    "/healthx",
    "/metricsx",
    "/svdserve-other",
    "/of/a/later/vllm",
)
MONITORING = ("/metrics", "/metrics/", "/dashboard", "/dashboard/app.js", "/svdserve/model")


@pytest.mark.parametrize("path", [*GUARDED, *MONITORING])
def test_every_route_needs_a_key(guarded: Guard, path: str) -> None:
    wrong = [{}, bearer(FIRST[:-1]), bearer(""), {"authorization": FIRST}, {"x-api-key": "none"}]
    for headers in wrong:
        answer = ask(guarded, "GET", path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for key in (FIRST, SECOND):
        for headers in (bearer(key), {"authorization": f"bearer  {key}"}, {"x-api-key": key}):
            assert ask(guarded, "GET", path, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_supervisors_need_no_key(guarded: Guard, path: str) -> None:
    assert ask(guarded, "GET", path).status_code == 200


def test_a_browser_gives_the_key_of_the_dashboard_as_a_password(guarded: Guard) -> None:
    for path, status in [("/dashboard", 200), ("/metrics", 200), ("/v1/models", 401)]:
        credentials = base64.b64encode(f"anybody:{FIRST}".encode()).decode()
        headers = {"authorization": f"Basic {credentials}"}
        assert ask(guarded, "GET", path, headers=headers).status_code == status
    assert ask(guarded, "GET", "/metrics", headers={"authorization": "Basic ?"}).status_code == 401
    assert ask(guarded, "GET", "/dashboard").headers["www-authenticate"].startswith("Basic ")
    assert ask(guarded, "GET", "/v1/models").headers["www-authenticate"].startswith("Bearer ")


def test_monitoring_has_its_own_switch(guarded: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDSERVE_METRICS_AUTH", "none")
    opened = Guard(application())
    assert all(ask(opened, "GET", path).status_code == 200 for path in MONITORING)
    assert all(ask(opened, "GET", path).status_code == 401 for path in GUARDED)
    assert ask(guarded, "GET", "/metrics").status_code == 401


def test_only_preflight_passes(guarded: Guard) -> None:
    preflight = {"origin": "https://page", "access-control-request-method": "POST"}
    # 405 is of the application itself.
    assert ask(guarded, "OPTIONS", "/v1/models", headers=preflight).status_code == 405
    assert ask(guarded, "OPTIONS", "/v1/models").status_code == 401
    for header in preflight.items():
        assert ask(guarded, "OPTIONS", "/metrics", headers=dict([header])).status_code == 401
    assert ask(guarded, "GET", "/metrics", headers=preflight).status_code == 401


@pytest.mark.parametrize("length", [0, 1, 1000, 1001, 100_000])
@pytest.mark.parametrize("declared", [True, False])
def test_long_bodies_are_refused(guarded: Guard, length: int, declared: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, length, 300):
            yield b"x" * min(300, length - start)

    body = b"x" * length if declared else pieces()
    answer = ask(guarded, "POST", "/v1/completions", headers=bearer(FIRST), content=body)
    if length <= 1000:
        assert answer.json()["bytes"] == length
    else:
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_streams_pass_unchanged(guarded: Guard) -> None:
    answer = ask(guarded, "GET", "/events", headers=bearer(FIRST))
    assert answer.text == "".join(f"data: {number}\n\n" for number in range(3))


def test_the_root_path_is_no_way_around(guarded: Guard) -> None:
    """What a proxy has prefixed is judged by the path that the application routes by."""

    def status(path: str) -> int:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        scope: Scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "root_path": "/health",
            "headers": [],
            "query_string": b"",
        }
        anyio.run(guarded, scope, receive, send)
        return int(sent[0]["status"])

    assert status("/health/v1/models") == 401
    assert status("/healthv1/models") == 401
    assert status("/health/health") == 200


def test_a_websocket_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDSERVE_API_KEYS", FIRST)
    reached: list[str] = []

    async def application(scope: Scope, _receive: Receive, _send: Send) -> None:
        reached.append(scope["path"])

    def closed(headers: list[tuple[bytes, bytes]]) -> list[Message]:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/realtime", "headers": headers}
        anyio.run(Guard(application), scope, receive, send)
        return sent

    (message,) = closed([])
    assert (message["type"], message["code"]) == ("websocket.close", 1008)
    assert not reached
    assert not closed([(b"authorization", f"Bearer {FIRST}".encode())])
    assert reached == ["/v1/realtime"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_listening_to_all_without_a_key_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    several = ["--nnodes", "2", "--port", "0"]  # whose memory is not ours to check
    flags = [*several, "--host", host]
    server_arguments(str(tmp_path), flags)
    assert "--api-keys-file" in capsys.readouterr().err
    server_arguments(str(tmp_path), flags, guarded=True)
    server_arguments(str(tmp_path), several)
    assert capsys.readouterr().err == ""
