"""A reverse proxy in front of a server under test."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

HOST = "127.0.0.1"


@contextmanager
def proxy(target: str, port: int, key: str) -> Iterator[str]:
    """A reverse proxy below a path, which wants an API key for all but the page's own files."""

    async def forward(request: Request) -> Response:
        path = request.url.path.removeprefix("/llm")
        open_to_all = path.startswith("/dashboard")
        if not open_to_all and request.headers.get("Authorization") != f"Bearer {key}":
            return Response(status_code=401)
        async with httpx.AsyncClient() as client:
            answer = await client.get(target + path)
        headers = {k: v for k, v in answer.headers.items() if k != "content-length"}
        return Response(answer.content, answer.status_code, headers)

    app = Starlette(routes=[Route("/llm/{path:path}", forward)])
    served = uvicorn.Server(uvicorn.Config(app, HOST, port, log_level="error"))
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        while not served.started:
            time.sleep(0.05)
        yield f"http://{HOST}:{port}/llm"
    finally:
        served.should_exit = True
        thread.join()
