"""The shape of errors, in front of a small application."""

import logging
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, TypeAdapter, model_validator
from vllm.exceptions import VLLMValidationError

from svdserve.server.http.errors import RequestErrors
from svdserve.server.plugin.log_filter import without_trace

VLLM = {"message": "not this", "type": "NotImplementedError", "param": None, "code": 501}


def application() -> FastAPI:
    app = FastAPI()

    @app.get("/refused")
    def refused() -> None:
        raise HTTPException(429, "too often", {"retry-after": "3"})

    @app.get("/vllm/{status}")
    def vllm(status: int) -> JSONResponse:
        return JSONResponse({"error": VLLM}, status)

    @app.get("/plain/{status}")
    def plain(status: int) -> PlainTextResponse:
        return PlainTextResponse("text", status, {"x-own": "kept"})

    @app.get("/stream")
    def stream() -> StreamingResponse:
        return StreamingResponse(iter(["a", "b"]), media_type="text/event-stream")

    @app.post("/json")
    def parsed(body: dict[str, int]) -> dict[str, int]:
        return body

    @app.post("/validated")
    def validated(body: Careless) -> Careless:
        return body

    @app.post("/faulty")
    def faulty(body: dict[str, object]) -> Careless:
        return TypeAdapter(Careless).validate_python(body)

    return app


class Careless(BaseModel):
    """Its validator fails on what is no dictionary, and not in the way that pydantic expects."""

    options: dict[str, int]

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: Any) -> Any:
        data["options"].get("any")
        return data


def ask(method: str, path: str, **options: object) -> httpx.Response:
    async def send() -> httpx.Response:
        app = application()
        app.add_middleware(RequestErrors)  # as vLLM does
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            return await client.request(method, path, **options)  # type: ignore[arg-type]

    return anyio.run(send)


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "message"),
    [
        ("GET", "/nowhere", 404, "not_found", "Not Found"),
        ("POST", "/stream", 405, "method_not_allowed", "Method Not Allowed"),
        ("GET", "/refused", 429, "too_many_requests", "too often"),
        ("GET", "/vllm/501", 404, "not_supported", "not this"),
        ("GET", "/plain/501", 404, "not_supported", "The model does not support this request."),
    ],
)
def test_refusals_have_the_shape(
    method: str, path: str, status: int, code: str, message: str
) -> None:
    answer = ask(method, path)
    assert answer.status_code == status
    assert answer.json()["error"] == {
        "message": message,
        "type": "invalid_request_error",
        "param": None,
        "code": code,
    }


def test_headers_of_a_refusal_stay() -> None:
    assert ask("GET", "/refused").headers["retry-after"] == "3"
    assert ask("POST", "/stream").headers["allow"] == "GET"


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_what_has_the_shape_or_another_is_left_alone(status: int) -> None:
    assert ask("GET", f"/vllm/{status}").json() == {"error": VLLM}
    answer = ask("GET", f"/plain/{status}")
    assert (answer.status_code, answer.text, answer.headers["x-own"]) == (status, "text", "kept")


def test_answers_pass() -> None:
    assert ask("GET", "/stream").text == "ab"
    assert ask("POST", "/json", json={"a": 1}).json() == {"a": 1}
    assert isinstance(ask("POST", "/json", json=[]).json()["detail"], list)


def test_a_validator_that_fails_has_met_a_bad_request() -> None:
    assert ask("POST", "/validated", json={"options": {"a": 1}}).status_code == 200
    answer = ask("POST", "/validated", json={"options": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_value"


def test_the_same_failure_elsewhere_is_a_fault() -> None:
    with pytest.raises(AttributeError):
        ask("POST", "/faulty", json={"options": True})


@pytest.mark.parametrize(
    ("name", "error", "kept"),
    [
        ("vllm.entrypoints.anthropic.api_router", VLLMValidationError("empty"), False),
        ("vllm.entrypoints.generate", ValueError("wrong"), False),
        ("vllm.entrypoints.generate", RuntimeError("a fault"), True),
        ("vllm.v1.engine.core", ValueError("a fault"), True),
    ],
)
def test_a_bad_request_leaves_no_trace(
    caplog: pytest.LogCaptureFixture, name: str, error: Exception, kept: bool
) -> None:
    with caplog.filtering(without_trace):  # type: ignore[arg-type]
        try:
            raise error
        except Exception:
            logging.getLogger(name).exception("Error in %s", "it")
    (record,) = caplog.records
    assert record.getMessage().startswith("Error in it")
    assert bool(record.exc_info) is kept
    assert ("Traceback" in caplog.text) is kept
