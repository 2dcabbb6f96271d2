"""How a server ends: SIGTERM lets the requests in flight finish, and a dead engine is a failure.

vLLM's own shutdown (--shutdown-timeout) drains the engine, but has three faults: it still accepts
requests, which the engine then refuses; it closes the connection to the engine before the last
tokens are sent; and it exits with 0 if the engine has died. This ASGI middleware, the outermost one
in every API server process, first waits for the HTTP requests and only then lets vLLM shut down.
"""

import asyncio
import contextlib
import logging
import math
import signal
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svdserve.server.http.errors import send_error
from svdserve.server.http.security import is_monitoring, route_path

MIDDLEWARE = f"{__name__}.GracefulShutdown"
ENGINE_SECONDS = 5.0
_POLL_SECONDS = 0.5
_engine_died = False

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM adds handlers only to its own name


def engine_died() -> bool:
    """Whether the server of this process ended, or ends, because its engine did."""
    return _engine_died


class GracefulShutdown:
    """Tracks the requests in flight; on SIGTERM refuses new ones and waits for these."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._requests: set[asyncio.Task[Any]] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._deadline: float | None = None  # on the loop's clock; None until shutdown begins
        self._grace = 0.0
        self._stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        if self._deadline is not None and not is_monitoring(route_path(scope)):
            await self._refuse(scope, send)
            return
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._expired():
                raise
            with contextlib.suppress(RuntimeError):  # the answer may have begun
                await self._refuse(scope, send)
        finally:
            self._requests.discard(task)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    self._start(scope["app"].state)
                except Exception:  # another vLLM has other names; it then shuts down by itself
                    logger.exception("A shutdown will not wait for the requests in flight")
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            for task in self._background:
                task.cancel()

    def _start(self, state: Any) -> None:
        engine = state.engine_client
        if engine is None:  # vLLM's render server
            return
        self._grace = float(engine.vllm_config.shutdown_timeout)
        engine.shutdown = self._noted(engine.shutdown)
        # This replaces vLLM's handler of SIGTERM; _drain raises SIGINT, which vLLM handles.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._terminate)
        self._keep(self._watch(engine))

    def _noted(self, shutdown: Callable[..., None]) -> Callable[..., None]:
        """Wrap the engine's ``shutdown`` so that the call is noted and waits briefly.

        The requests have ended by then, so the engine needs time only to end itself.
        """

        def shut_down(timeout: float | None = None) -> None:
            self._stopping = True
            shutdown(timeout=ENGINE_SECONDS if timeout is None else min(timeout, ENGINE_SECONDS))

        return shut_down

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("A watcher of this server has failed", exc_info=error)

    def _terminate(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._grace
            self._keep(self._drain())
        else:
            self._deadline = now  # a second SIGTERM ends the server at once

    async def _drain(self) -> None:
        count = len(self._requests)
        logger.info("Shutting down: %d requests have %g s to finish", count, self._grace)
        try:
            while self._requests and not self._expired():
                await asyncio.wait(self._requests, timeout=min(_POLL_SECONDS, self._remaining()))
            if self._requests:
                logger.warning("%d requests have not finished and are cut off", len(self._requests))
                for task in self._requests:
                    task.cancel()
                await asyncio.wait(self._requests)
        except Exception:  # whatever fails, the server must end
            logger.exception("The server ends without waiting for the requests in flight")
        signal.raise_signal(signal.SIGINT)

    def _remaining(self) -> float:
        """Seconds that the requests in flight still have."""
        assert self._deadline is not None
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def _expired(self) -> bool:
        return self._deadline is not None and self._remaining() == 0

    async def _refuse(self, scope: Scope, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1012, "reason": "the server ends"})
            return
        # After that time this server is gone, and its successor or another replica answers.
        headers = {"retry-after": str(max(1, math.ceil(self._remaining()))), "connection": "close"}
        status = HTTPStatus.SERVICE_UNAVAILABLE
        await send_error(send, status, "The server is shutting down.", "shutting_down", headers)

    async def _watch(self, engine: Any) -> None:
        """Note the engine's death. vLLM's watchdog then ends the server, within 5 seconds."""
        global _engine_died
        while not engine.errored:
            await asyncio.sleep(_POLL_SECONDS)
        if not self._stopping:
            _engine_died = True
            logger.error("The engine process has died; the server is shutting down")
