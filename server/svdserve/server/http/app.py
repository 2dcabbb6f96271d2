"""Our part of vLLM's API server: the plug-in that its ``vllm.endpoint_plugins`` group loads.

The application, its OpenAI routes and /metrics stay vLLM's own. This module adds the routes
GET /svdserve/model, /svdserve/groups and /dashboard and the middleware of errors.py, and starts the
gauges of metrics.py. The interface is vllm/plugins/endpoint_plugins/interface.py. vLLM loads such
plug-ins only if VLLM_PLUGINS names them, so serve.py sets it.
"""

import asyncio
import logging
import os
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel
from starlette.middleware import Middleware

from svdserve.compression.evaluation.inspection import ModuleFacts, inspect_checkpoint
from svdserve.compression.format.reader import is_checkpoint
from svdserve.compression.system.errors import UserError
from svdserve.server.http.dashboard import attach_dashboard
from svdserve.server.http.errors import RequestErrors
from svdserve.server.layer_checks import require_right, wanted
from svdserve.server.metrics import ModelFacts, ServerMetrics, model_facts, resident_bytes
from svdserve.server.worker import EXTENSION, METHOD, WorkerReport, slowest_load

NAME = "svdserve"
logger = logging.getLogger(f"vllm.{__name__}")  # vLLM adds handlers only to its own name


class ServedModel(BaseModel):
    """Answer of GET /svdserve/model; ``load_seconds`` is the slowest worker's, if it is known."""

    name: str
    model: ModelFacts
    load_seconds: float | None


class Groups(BaseModel):
    """Answer of GET /svdserve/groups: the facts of each factored module; none if dense."""

    model_name: str
    keep_ratio: float
    modules: tuple[ModuleFacts, ...]


@dataclass(frozen=True)
class State:
    """The answers of the routes, which do not change while the server runs."""

    model: ServedModel
    groups: Groups


class EndpointPlugin:
    """The routes and their state; every API server process has one instance."""

    name = NAME
    required_tasks = None

    def __init__(self) -> None:
        self._watch: asyncio.Task[None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes and middleware; vLLM calls this once its own routes are attached."""

        def state(request: Request) -> State:
            known: State | None = getattr(request.app.state, NAME, None)
            if known is None:
                raise HTTPException(
                    404, "the served model is not a local directory of safetensors files"
                )
            return known

        @app.get("/svdserve/model")
        def served_model(request: Request) -> ServedModel:
            return state(request).model

        @app.get("/svdserve/groups")
        def groups(request: Request) -> Groups:
            return state(request).groups

        attach_dashboard(app)
        # The last middleware is the innermost, so http_requests_total counts the statuses that
        # clients get.
        app.user_middleware.append(Middleware(RequestErrors))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Collect the facts of the model and start its gauges; judge the layers if wanted.

        vLLM calls this after it has loaded the model and before the server listens.
        ``engine_client`` is None on vLLM's render server, which holds no model.

        Raises:
            UserError: the layers were to be verified, and one is wrong or the workers do not tell.
        """
        if engine_client is None:
            return
        reports: list[WorkerReport] = []
        try:
            reports = await worker_reports(engine_client)
            await self._start(engine_client, state, args, reports)
        except Exception as error:  # e.g. another vLLM has other names; the server still serves
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            logger.warning("svdserve gauges are off: %s%s", kind, error)
        if wanted():
            if not reports:
                raise UserError(
                    "--verify: the workers have not reported their layers; leave out "
                    "--worker-extension-cls, or serve without --verify"
                )
            require_right([check for report in reports for check in report.checks])

    async def _start(
        self, engine_client: Any, state: Any, args: Namespace, reports: list[WorkerReport]
    ) -> None:
        config = engine_client.vllm_config
        directory = Path(config.model_config.model)
        facts = model_facts(directory)
        modules = inspect_checkpoint(directory).modules if is_checkpoint(directory) else ()
        name = (args.served_model_name or [args.model])[0]
        load_seconds = slowest_load(reports)
        model = ServedModel(name=name, model=facts, load_seconds=load_seconds)
        groups = Groups(model_name=name, keep_ratio=facts.keep_ratio, modules=modules)
        setattr(state, NAME, State(model, groups))
        parallel = config.parallel_config
        roles = pids(max(0, parallel._api_process_rank), parallel._api_process_count, reports)
        metrics = ServerMetrics(name, facts, partial(resident_bytes, roles), reports)
        self._watch = asyncio.create_task(metrics.watch())


async def worker_reports(engine_client: Any) -> list[WorkerReport]:
    """The report of every worker; none if the workers have another extension than svdserve's."""
    if engine_client.vllm_config.parallel_config.worker_extension_cls != EXTENSION:
        return []
    answers = await engine_client.collective_rpc(METHOD)
    return [WorkerReport.model_validate(answer) for answer in answers]


def pids(api_server: int, api_servers: int, reports: list[WorkerReport]) -> dict[str, int]:
    """Process ids by role: this API server, the engine core, each worker of this machine.

    Several API servers are children of a launcher, which is listed too. If vLLM runs its only
    worker inside the engine core (one GPU), that process is listed only as the worker, so that a
    sum over the roles counts nothing twice.
    """
    local = [report for report in reports if report.local]
    roles = {f"api_server_{api_server}": os.getpid()}
    if api_servers > 1:
        roles["launcher"] = os.getppid()
    roles |= {f"worker_{report.rank}": report.pid for report in local}
    # An API server is the parent of its engine core; with several, all have the launcher as parent.
    for parent in {report.parent_pid for report in local} - {os.getpid(), os.getppid()}:
        roles["engine_core"] = parent
    return roles
