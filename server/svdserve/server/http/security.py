"""ASGI middleware in front of vLLM's application: API keys and a limit on the length of requests.

vLLM's own --api-key guards only paths below /v1, /v2, /inference and /cohere, and so leaves
/invocations, /tokenize and /scale_elastic_ep open. Here every route needs a key except those that
are listed. vLLM's --middleware flag adds the class in every API server process, and vLLM does not
start if it cannot add it. The settings come through the environment, which those processes inherit.
docs/security.md has the threat model.
"""

import base64
import binascii
import os
from collections import deque
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svdserve.server.http.errors import send_error
from svdserve.server.http.keys import ApiKeys, digest_of

ENV_KEYS = "SVDSERVE_API_KEYS"
ENV_KEYS_FILE = "SVDSERVE_API_KEYS_FILE"
ENV_METRICS_AUTH = "SVDSERVE_METRICS_AUTH"
ENV_MAX_BODY_BYTES = "SVDSERVE_MAX_BODY_BYTES"
MIDDLEWARE = f"{__name__}.Guard"

# Routes for supervisors and load balancers; their answers have a status and no content.
OPEN_ROUTES = ("/health", "/ping")
MONITORING_ROUTES = ("/metrics", "/dashboard", "/svdserve", "/load", "/version")

MetricsAuth = Literal["key", "none"]


class SecurityOptions(BaseModel):
    """Settings of the Guard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_keys: frozenset[bytes] = Field(
        default=frozenset(), description="The digests of the keys that do not change."
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="A file with one API key on each line. The server reads the file again when it "
        "changes. If no key is set anywhere, requests need none.",
    )
    metrics_auth: MetricsAuth = Field(
        default="key",
        description="Whether `/metrics`, `/dashboard` and the other routes for monitoring need a "
        "key (`key`) or not (`none`), if there are keys.",
    )
    max_body_bytes: int = Field(
        default=8 << 20,
        ge=1,
        description="The size of the longest request that the server reads, in bytes.",
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "SecurityOptions":
        """Read the variables ENV_*; absent and empty ones leave the default.

        Commas or white space separate the keys in ENV_KEYS.

        Raises:
            UserError: an entry of ENV_KEYS is not a key.
            ValidationError: another variable is out of range.
        """
        entries = environment.get(ENV_KEYS, "").replace(",", " ").split()
        given = {
            "api_keys_file": environment.get(ENV_KEYS_FILE),
            "metrics_auth": environment.get(ENV_METRICS_AUTH),
            "max_body_bytes": environment.get(ENV_MAX_BODY_BYTES),
        }
        return cls(
            api_keys=frozenset(digest_of(entry, ENV_KEYS) for entry in entries),
            **{name: value for name, value in given.items() if value},  # type: ignore[arg-type]
        )

    def to_environment(self) -> dict[str, str]:
        """The variables that ``from_environment`` reads, with digests in place of keys."""
        variables = {
            ENV_KEYS: ",".join(f"sha256:{digest.hex()}" for digest in sorted(self.api_keys)),
            ENV_METRICS_AUTH: self.metrics_auth,
            ENV_MAX_BODY_BYTES: str(self.max_body_bytes),
        }
        if self.api_keys_file is not None:
            variables[ENV_KEYS_FILE] = str(self.api_keys_file.absolute())
        return variables


class Guard:
    """Asks for a key, refuses bodies that are too long, and hides the model's path on disk."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._options = SecurityOptions.from_environment()
        self._keys = ApiKeys(self._options.api_keys, self._options.api_keys_file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            _hide_model_path(scope["app"].state)
            await self._app(scope, receive, send)
            return
        if not _is_preflight(scope) and not self._may_pass(scope):
            await _refuse_key(scope, send)
            return
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        received = await _read_body(scope, receive, self._options.max_body_bytes)
        if received is None:
            limit = self._options.max_body_bytes
            message = f"The request body is longer than {limit:,} bytes."
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            await send_error(send, status, message, "request_too_large", {"connection": "close"})
            return

        async def replay() -> Message:
            return received.popleft() if received else await receive()

        await self._app(scope, replay, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = route_path(scope)
        if not self._keys.required or path in OPEN_ROUTES:
            return True
        monitoring = is_monitoring(path)
        if monitoring and self._options.metrics_auth == "none":
            return True
        return any(self._keys.accepts(key) for key in _presented(Headers(scope=scope), monitoring))


def _is_preflight(scope: Scope) -> bool:
    """Whether this is a browser's CORS preflight, sent without a key.

    vLLM's CORS middleware answers a preflight before any route. Other OPTIONS requests do reach
    routes, and /metrics answers every method.
    """
    if scope.get("method") != "OPTIONS":
        return False
    headers = Headers(scope=scope)
    return "origin" in headers and "access-control-request-method" in headers


def route_path(scope: Scope) -> str:
    """The path that the application routes by: the request's path without Starlette's root path."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def is_monitoring(path: str) -> bool:
    """Whether a route reports on the server, rather than doing its work."""
    return any(path == route or path.startswith(f"{route}/") for route in MONITORING_ROUTES)


def _presented(headers: Headers, monitoring: bool) -> list[bytes]:
    """The keys in a request: in OpenAI's header, in Anthropic's, or as a browser's password."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    offered = []
    if scheme.lower() == "bearer":
        offered.append(credentials.strip().encode("latin-1"))
    elif scheme.lower() == "basic" and monitoring:
        try:
            decoded = base64.b64decode(credentials, validate=True)
        except binascii.Error:
            decoded = b""
        offered.append(decoded.partition(b":")[2])
    if "x-api-key" in headers:
        offered.append(headers["x-api-key"].encode("latin-1"))
    return offered


async def _read_body(scope: Scope, receive: Receive, limit: int) -> deque[Message] | None:
    """The messages of the whole body, or None as soon as it is known to be longer than ``limit``.

    Reading the whole body first delays nothing, because the application parses bodies as a whole.
    """
    declared = Headers(scope=scope).get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        return None
    messages: deque[Message] = deque()
    length, more = 0, True
    while more:
        message = await receive()
        messages.append(message)
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
        if length > limit:
            return None
    return messages


async def _refuse_key(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": "an API key is required"})
        return
    # Only Basic makes a browser ask for the key, which the dashboard needs.
    scheme = "Basic" if is_monitoring(route_path(scope)) else "Bearer"
    await send_error(
        send,
        HTTPStatus.UNAUTHORIZED,
        "A valid API key is required: Authorization: Bearer KEY.",
        "invalid_api_key",
        {"www-authenticate": f'{scheme} realm="svdserve"'},
    )


def _hide_model_path(state: Any) -> None:
    """Replace the model's directory, which GET /v1/models would return as its root, by its name."""
    models = getattr(state, "openai_serving_models", None)
    for model in getattr(models, "base_model_paths", ()):
        model.model_path = model.name
