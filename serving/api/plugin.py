"""Our part of vLLM's HTTP server: ``/ready``, the middleware, metrics; and the proof before the first request."""

from __future__ import annotations

import asyncio
import atexit
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import prometheus_client
import structlog
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import State

from monitor.explain_metrics import ExplainMetrics
from monitor.exporter import Exporter
from monitor.sinks.bound import bound_by
from monitor.sinks.sinks import Sinks
from serving.api.access import Gate, put_before
from serving.api.access_metrics import AccessMetrics
from serving.api.auditing import Audit, open_audit
from serving.api.binding import is_local, require_keys
from serving.api.callers import Callers
from serving.api.control import control_routes
from serving.api.desk import Desk
from serving.api.holding import HoldMiddleware
from serving.api.keyring import KeyRing
from serving.api.keys import ring_of, sender_digests
from serving.api.middleware import MonitorMiddleware
from serving.api.open_routes import refuse_open_routes
from serving.api.opening import open_desk, require_destinations
from serving.api.outlets import open_ledger, open_sinks
from serving.api.protocol import use_bounded_protocol
from serving.api.request_ids import RequestIds
from serving.api.sessions import Sessions, needs_sessions, open_sessions, require_shared
from serving.api.tracing import Tracing, is_tracing_on, open_provider
from serving.api.triggers import Triggers
from serving.deployment import Deployment
from serving.engine import plugin as engine_plugin
from serving.engine.canary import Canaries
from serving.engine.explanations import Explanations
from serving.engine.frontend import Frontend
from serving.engine.ledger import Ledger
from serving.engine.lifeline import Lifeline
from serving.engine.proof import prove
from serving.engine.reloader import Listeners, Reloader
from serving.engine.template import require_template

log = structlog.get_logger(__name__)


class TelltaleEndpoints:
    """Implements vLLM's ``EndpointPlugin`` protocol."""

    name = "telltale_api"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._canaries: Canaries | None = None
        self._callers = Callers()
        self._gate = Gate()
        self._audit: Audit | None = None
        self._sessions: Sessions | None = None
        self._sinks: Sinks | None = None
        self._ledger: Ledger | None = None
        self._reloader: Reloader | None = None
        self._desk: Desk | None = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._explaining: asyncio.Task[None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add our route and the middleware."""
        use_bounded_protocol()
        put_before(app, self._gate)
        frontend = engine_plugin.install()
        check = frontend.asked_steers
        # Inside of the other, which says where a request comes from: what is added first stands further inside.
        app.add_middleware(HoldMiddleware, frontend=frontend, desk=lambda: self._desk, root_path=app.root_path or "")
        if is_tracing_on():
            # What is added later stands further outside.
            app.add_middleware(Tracing, provider=open_provider(), root_path=app.root_path or "")
        app.add_middleware(
            MonitorMiddleware,
            root_path=app.root_path or "",
            check_xargs=check,
            callers=self._callers,
            audit=lambda: self._audit,
            plan=lambda: frontend.deployment.plan,
            sessions=lambda: self._sessions,
        )
        app.add_middleware(RequestIds)

        app.include_router(control_routes(lambda: self._reloader))

        @app.get("/ready", include_in_schema=True, tags=["telltale"])
        async def ready() -> JSONResponse:
            """200 while monitoring is proved: the proof at the start held and the newest canary passed; else 503."""
            status = self.status()
            return JSONResponse({"status": status}, status_code=200 if status == "ready" else 503)

    def status(self) -> str:
        """What ``/ready`` says. Why a canary fails stands in the log: it holds scores."""
        if self._engine is None or self._canaries is None:
            return "starting"
        if self._engine.errored:
            return "engine stopped"
        if any(task.done() for task in self._tasks):
            return "canary stopped"
        if self._canaries.failure is not None:
            return f"canary fails: {self._canaries.failure.reason.value}"
        if self._audit is not None and self._audit.is_failing:
            return "audit trail cannot be written"
        return "ready"

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Prove that the engine is monitored, then count, become ready, and go on proving it.

        Raises:
            probes.errors.TelltaleError: it is not.
        """
        refuse_open_routes(args)
        frontend = engine_plugin.install()
        template = getattr(args, "chat_template", None)
        text = Path(template).read_text() if template and Path(template).is_file() else template

        def check(deployment: Deployment) -> None:
            from_requests = bool(getattr(args, "trust_request_chat_template", False))
            require_template(deployment, template=text, from_requests=from_requests)
            require_destinations(deployment.plan, _names(state), os.environ)
            self._ring_of(deployment, args)
            self._remember(deployment, frontend, args)

        def adopt(deployment: Deployment) -> None:
            self._know_keys(deployment, args)
            if self._sinks is not None:
                self._sinks.bind(bound_by(deployment.plan.alerts))

        check(frontend.deployment)
        adopt(frontend.deployment)
        canaries = Canaries(engine_client, frontend)
        proof = await prove(engine_client, frontend, canaries)
        log.info("monitored", **proof.summary())
        if proof.without_canary:
            log.warning(
                "detectors without a canary: their coverage is proved, not that their scores are right",
                detectors=list(proof.without_canary),
            )
        # From here on: the proof's own request is no user's.
        exporter = Exporter(frontend.deployment.plan, prometheus_client.REGISTRY)
        frontend.export_to(exporter)
        self._gate.turned_away = AccessMetrics(prometheus_client.REGISTRY).turned_away
        self._audit = open_audit(frontend.deployment, prometheus_client.REGISTRY)
        self._sinks = open_sinks(frontend.deployment, prometheus_client.REGISTRY)
        self._ledger = ledger = open_ledger(
            frontend.deployment,
            engine_client.get_tokenizer(),
            audit=self._audit,
            sinks=self._sinks,
            traced=is_tracing_on(),
        )
        if ledger is not None:
            frontend.enter_into(ledger)
            # Before the trail and the sinks are closed: what was registered last is called first.
            atexit.register(frontend.abandon)
            if frontend.deployment.explainer is not None and self._audit is not None:
                metrics = ExplainMetrics(prometheus_client.REGISTRY)
                self._explain(Explanations(engine_client, frontend, ledger.explained, metrics), ledger)
        self._desk = open_desk(engine_client, frontend)
        exporter.canary_passed(canaries.seconds, canaries.deviation)

        def engine_ended() -> None:
            exporter.not_ready()
            frontend.abandon()

        lifeline = Lifeline(engine_client, lambda: state.server, ended=engine_ended)
        self._engine, self._canaries = engine_client, canaries
        self._reloader = Reloader(engine_client, frontend, canaries, Listeners(check, adopt))
        Triggers(self._reloader, frontend.deployment.file.path).listen()
        self._tasks = (
            asyncio.create_task(canaries.watch(exporter), name="telltale-canaries"),
            asyncio.create_task(lifeline.watch(), name="telltale-lifeline"),
        )

    @staticmethod
    def _ring_of(deployment: Deployment, args: Namespace) -> KeyRing:
        config = deployment.file.config
        ring = ring_of(config, sender_digests(getattr(args, "api_key", None) or ()))
        require_keys(config.access, ring, host=getattr(args, "host", None), uds=getattr(args, "uds", None))
        return ring

    def _know_keys(self, deployment: Deployment, args: Namespace) -> None:
        ring = self._ring_of(deployment, args)
        local = is_local(getattr(args, "host", None), getattr(args, "uds", None))
        self._callers.accept(deployment.plan.tenants, ring.digests)
        self._gate.accept(deployment.file.config.access, ring, local=local)

    def _remember(self, deployment: Deployment, frontend: Frontend, args: Namespace) -> None:
        """Open the sessions once a policy needs them, before it is in force: what cannot be opened refuses it."""
        settings = deployment.file.config.sessions
        require_shared(deployment.plan, settings, processes=getattr(args, "api_server_count", None) or 1)
        if self._sessions is None and needs_sessions(deployment.plan):
            self._sessions = open_sessions(
                lambda: frontend.deployment.plan, settings, prometheus_client.REGISTRY, ledger=lambda: self._ledger
            )

    def _explain(self, explanations: Explanations, ledger: Ledger) -> None:
        """Explain what is flagged from now on. Where that ends, serving goes on: it decides nothing."""
        ledger.tell_flags(explanations.offer)
        self._explaining = asyncio.create_task(explanations.watch(), name="telltale-explanations")


def _names(state: State) -> frozenset[str]:
    """Names of models that this server answers to."""
    models = state.openai_serving_models
    return frozenset({*(path.name for path in models.base_model_paths), *models.lora_requests})


def endpoint_plugin() -> TelltaleEndpoints:
    """Entry point of ``vllm.endpoint_plugins``."""
    return TelltaleEndpoints()
