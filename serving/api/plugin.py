"""Our part of vLLM's HTTP server: ``/ready``, the middleware, metrics; and the proof before the first request."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import prometheus_client
import structlog
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import State

from monitor.exporter import Exporter
from serving.api.middleware import MonitorMiddleware
from serving.engine import plugin as engine_plugin
from serving.engine.proof import prove
from serving.engine.template import require_template

log = structlog.get_logger(__name__)


class TelltaleEndpoints:
    """Implements vLLM's ``EndpointPlugin`` protocol."""

    name = "telltale_api"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Add our route and the middleware."""
        app.add_middleware(MonitorMiddleware, root_path=app.root_path or "")

        @app.get("/ready", include_in_schema=True, tags=["telltale"])
        async def ready() -> JSONResponse:
            """200 once the taps were seen to fire and the policy is loaded; 503 otherwise."""
            if self._engine is None:
                return JSONResponse({"status": "starting"}, status_code=503)
            if self._engine.errored:
                return JSONResponse({"status": "engine stopped"}, status_code=503)
            return JSONResponse({"status": "ready"})

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Prove that the engine is monitored, then count and become ready.

        Raises:
            probes.errors.TelltaleError: it is not.
        """
        frontend = engine_plugin.install()
        template = getattr(args, "chat_template", None)
        require_template(
            frontend.deployment,
            template=Path(template).read_text() if template and Path(template).is_file() else template,
            from_requests=bool(getattr(args, "trust_request_chat_template", False)),
        )
        exporter = Exporter(frontend.deployment.plan, prometheus_client.REGISTRY)
        frontend.export_to(exporter)
        report = await prove(engine_client, frontend)
        log.info("monitored", **report.summary())
        exporter.ready()
        self._engine = engine_client


def endpoint_plugin() -> TelltaleEndpoints:
    """Entry point of ``vllm.endpoint_plugins``."""
    return TelltaleEndpoints()
