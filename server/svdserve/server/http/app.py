"""Our part of vLLM's API server: the plug-in that its ``vllm.endpoint_plugins`` group loads.

The application, its OpenAI routes and /metrics stay vLLM's own. This adds GET /svdserve/model,
/svdserve/groups and /dashboard, the shape of errors (errors.py), and starts the gauges of
metrics.py. The contract is vllm/plugins/endpoint_plugins/interface.py; vLLM loads such plug-ins
only when VLLM_PLUGINS names them, which serve.py sees to.
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
from svdserve.server.metrics import ModelFacts, ServerMetrics, model_facts, resident_bytes
from svdserve.server.worker import EXTENSION, METHOD, WorkerReport, slowest_load

NAME = "svdserve"
logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures handlers below its own name only.


class ServedModel(BaseModel):
    """Answer of GET /svdserve/model."""

    name: str
    model: ModelFacts
    load_seconds: float | None


class Groups(BaseModel):
    """Answer of GET /svdserve/groups: what compression did, module by module; empty if dense."""

    model_name: str
    keep_ratio: float
    modules: tuple[ModuleFacts, ...]


@dataclass(frozen=True)
class State:
    """What the routes answer from."""

    model: ServedModel
    groups: Groups


class EndpointPlugin:
    """Routes and state; one instance lives in every API server process."""

    name = NAME
    required_tasks = None

    def __init__(self) -> None:
        self._watch: asyncio.Task[None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Called by vLLM once its own routes are attached."""

        def state(request: Request) -> State:
            known: State | None = getattr(request.app.state, NAME, None)
            if known is None:
                raise HTTPException(404, "the served model is no local directory of safetensors")
            return known

        @app.get("/svdserve/model")
        def served_model(request: Request) -> ServedModel:
            return state(request).model

        @app.get("/svdserve/groups")
        def groups(request: Request) -> Groups:
            return state(request).groups

        attach_dashboard(app)
        # The last is the innermost: http_requests_total counts the statuses that clients get.
        app.user_middleware.append(Middleware(RequestErrors))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called by vLLM before the server listens; the model is loaded by then.

        ``engine_client`` is None on vLLM's render server, which holds no model.
        """
        if engine_client is None:
            return
        try:
            await self._start(engine_client, state, args)
        except Exception as error:  # such as a vLLM that names things otherwise; it serves on
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            logger.warning("svdserve gauges are off: %s%s", kind, error)

    async def _start(self, engine_client: Any, state: Any, args: Namespace) -> None:
        config = engine_client.vllm_config
        directory = Path(config.model_config.model)
        facts = model_facts(directory)
        modules = inspect_checkpoint(directory).modules if is_checkpoint(directory) else ()
        reports = []
        if config.parallel_config.worker_extension_cls == EXTENSION:
            answers = await engine_client.collective_rpc(METHOD)
            reports = [WorkerReport.model_validate(answer) for answer in answers]
        name = (args.served_model_name or [args.model])[0]
        load_seconds = slowest_load(reports)
        model = ServedModel(name=name, model=facts, load_seconds=load_seconds)
        groups = Groups(model_name=name, keep_ratio=facts.keep_ratio, modules=modules)
        setattr(state, NAME, State(model, groups))
        parallel = config.parallel_config
        roles = pids(max(0, parallel._api_process_rank), parallel._api_process_count, reports)
        metrics = ServerMetrics(name, facts, partial(resident_bytes, roles), reports)
        self._watch = asyncio.create_task(metrics.watch())


def pids(api_server: int, api_servers: int, reports: list[WorkerReport]) -> dict[str, int]:
    """Process ids by role: this API server, the engine core, each worker of this machine.

    Several API servers are children of a launcher, which is told too. Where vLLM runs its only
    worker inside the engine core (one GPU), that process is the worker's entry alone, so that a sum
    over the roles counts nothing twice.
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
