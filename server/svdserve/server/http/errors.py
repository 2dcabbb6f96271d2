"""ASGI middleware that gives every error the shape and status that OpenAI's clients expect.

vLLM gives most errors OpenAI's shape. This middleware changes the others:

* Errors of vLLM's web framework ({"detail": ...}, e.g. for an unknown route or a body that is not
  JSON) get OpenAI's shape.
* The status 501, for a request that the served model cannot do, becomes 404: a 5xx would make
  clients retry and operators look for a fault, although the request is at fault.
* If vLLM's code that reads a request fails on an unexpected value, the answer is 400. In vLLM 0.32
  this happens in a validator whose exception pydantic does not catch ({"structured_outputs": true})
  and in the conversion of messages of /v1/responses (one without content, or with a refusal).

Other 5xx are left alone. app.py puts this middleware inside vLLM's counter of answers, so that the
counter sees the changed statuses. In the log a bad request is one line, without the stack trace
that some of vLLM's routes write.
"""

import json
import logging
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from itertools import pairwise
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svdserve.server.plugin.log_filter import without_trace

# The modules that call pydantic to check a request.
_READERS = {"fastapi.dependencies.utils", "vllm.entrypoints.serve.sagemaker.api_router"}

# The module that converts a request of /v1/responses to messages.
_CONVERTER = "vllm.entrypoints.openai.responses.utils"
_UNEXPECTED = (AttributeError, IndexError, KeyError, TypeError)

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM adds handlers only to its own name


class RequestErrors:
    """Gives every error answer OpenAI's shape, and passes all other answers on unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        for handler in logging.getLogger("vllm").handlers:
            handler.addFilter(without_trace)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def shaped_send(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _send_shaped(send, start, body)

        try:
            await self._app(scope, receive, shaped_send)
        except Exception as error:
            if not _fails_reading(error):
                raise
            told = f"{type(error).__name__}: {error}"
            logger.warning("A request to %s could not be read: %s", scope["path"], told)
            message = f"A field of the request has a value that is not supported ({error})."
            await send_error(send, HTTPStatus.BAD_REQUEST, message, "invalid_value")


def _fails_reading(error: Exception) -> bool:
    """Whether it was raised while pydantic checked the request, or vLLM converted its messages."""
    frames = traceback.walk_tb(error.__traceback__)
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    own = [name for name in modules if not name.startswith("pydantic.")]  # skips its __getattr__
    if own[-1:] == [_CONVERTER] and isinstance(error, _UNEXPECTED):
        return True
    direct = [name for name in modules if not name.startswith("fastapi._compat")]
    return any(
        reader in _READERS and checker == "pydantic.type_adapter"
        for reader, checker in pairwise(direct)
    )


async def _send_shaped(send: Send, start: Message, body: bytes) -> None:
    status = int(start["status"])
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    detail = content.get("detail") if isinstance(content, dict) else None
    if status == HTTPStatus.NOT_IMPLEMENTED:
        await send_error(send, HTTPStatus.NOT_FOUND, _message(content), "not_supported")
    elif isinstance(detail, str):
        kept = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in start["headers"]
            if name.lower() not in (b"content-type", b"content-length")
        }
        code = HTTPStatus(status).phrase.lower().replace(" ", "_")
        await send_error(send, HTTPStatus(status), detail, code, kept)
    else:
        await send(start)
        await send({"type": "http.response.body", "body": body})


def _message(content: Any) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    told = error.get("message") if isinstance(error, dict) else None
    return told if isinstance(told, str) else "The model does not support this request."


async def send_error(
    send: Send,
    status: HTTPStatus,
    message: str,
    code: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send an answer in the shape of OpenAI's errors."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **(headers or {}),
    }
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": int(status), "headers": raw})
    await send({"type": "http.response.body", "body": body})
