"""OpenTelemetry: a span for each generating request, and an event in it for each verdict.

Names are those of the semantic conventions for generative AI (status: development), and ``telltale.*`` where they have
none. Texts are never put into a span.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from importlib import import_module
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import serving
from monitor.events import Decision, Verdict
from monitor.types import Mode
from probes.card import Format
from probes.errors import TelltaleError
from serving.api.body import read_body
from serving.api.routes import generates
from serving.origin import Judged, Origin, current_origin, enter_origin, leave_origin

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

TRACING_VARIABLE = "TELLTALE_TRACING"
EVALUATION = "gen_ai.evaluation.result"
_PROVIDER = "vllm"
_LONGEST = 256
_ASKED = {
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "n": "gen_ai.request.choice.count",
}
Attributes = dict[str, Any]


class TracingError(TelltaleError, RuntimeError):
    """Tracing is asked for and cannot be done."""


def is_tracing_on() -> bool:
    """Whether the environment asks for traces: ``telltale serve --tracing`` sets it."""
    return os.environ.get(TRACING_VARIABLE) == "1"


def require_tracing() -> None:
    """Fail before a model is loaded if spans cannot be made.

    Raises:
        TracingError: the packages are missing.
    """
    for name in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
        try:
            import_module(name)
        except ImportError as error:
            raise TracingError(f"--tracing needs {error.name}. Run: pip install telltale[otel]") from error


def open_provider() -> TracerProvider:
    """Sends spans by OTLP over HTTP to where OTEL_EXPORTER_OTLP_ENDPOINT says, in batches, from a thread.

    It is no global one: vLLM has its own.

    Raises:
        TracingError: the packages are missing.
    """
    require_tracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "telltale"}
    provider = TracerProvider(resource=Resource.create({**name, "service.version": serving.__version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    atexit.register(provider.shutdown)
    return provider


class Tracing:
    """The layer that makes spans. Stands inside of the one that says where a request comes from.

    The client's ``traceparent`` is the parent of our span, and ours of vLLM's own (--otlp-traces-endpoint).

    Args:
        app: the application behind it.
        provider: makes and sends spans.
        root_path: prefix under which the application is mounted.
    """

    def __init__(self, app: ASGIApp, *, provider: TracerProvider, root_path: str = "") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._root = root_path.rstrip("/")
        self._tracer = provider.get_tracer("telltale", serving.__version__)
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or not generates(scope["method"], scope["path"].removeprefix(self._root)):
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, set_span_in_context

        body, receive = await read_body(receive)
        origin = current_origin().listening()
        asked = _asked(body, origin)
        parent = self._propagator.extract(Headers(scope=scope))
        span = self._tracer.start_span(
            asked["gen_ai.operation.name"], context=parent, kind=SpanKind.SERVER, attributes=asked
        )
        headers = MutableHeaders(raw=list(scope["headers"]))
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=set_span_in_context(span))
        for name in ("traceparent", "tracestate"):
            del headers[name]
        headers.update(carrier)
        watched = _Watched(span, send)
        token = enter_origin(origin)
        try:
            await self._app({**scope, "headers": headers.raw}, receive, watched)
        except Exception as error:
            watched.failed(type(error).__name__)
            raise
        finally:
            leave_origin(token)
            _conclude(span, asked, origin.decisions or (), ok=watched.status == HTTPStatus.OK)
            span.end()


class _Watched:
    """Stands in the place of ASGI's ``send``, and notes how a response begins."""

    def __init__(self, span: Span, send: Send) -> None:
        self._span = span
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            self._span.set_attribute("http.response.status_code", self.status)
            if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                self.failed(str(self.status))
        await self._send(message)

    def failed(self, what: str) -> None:
        """The server could not answer. That a request was blocked is no failure."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", what)
        self._span.set_status(Status(StatusCode.ERROR))


def _asked(body: bytes, origin: Origin) -> Attributes:
    """What the request asks for, of what may stand in a span."""
    operation = "chat" if origin.fmt is Format.CHAT else "text_completion"
    found: Attributes = {"gen_ai.operation.name": operation, "gen_ai.provider.name": _PROVIDER}
    if origin.caller.tenant:
        found["telltale.tenant"] = origin.caller.tenant
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # vLLM answers that
        return found
    if not isinstance(content, dict):
        return found
    if isinstance(content.get("model"), str):
        found["gen_ai.request.model"] = content["model"][:_LONGEST]
    for key, name in _ASKED.items():
        if isinstance(content.get(key), int | float):
            found[name] = content[key]
    return found


def _conclude(span: Span, asked: Attributes, judged: Sequence[Judged], *, ok: bool) -> None:
    """Say what came out. Names of models that are not served must not become names of spans."""
    if ok and "gen_ai.request.model" in asked:
        span.update_name(f"{asked['gen_ai.operation.name']} {asked['gen_ai.request.model']}")
    if not judged:
        return
    span.set_attributes(_outcome(judged))
    for one in judged:
        for verdict in one.decision.verdicts:
            span.add_event(EVALUATION, _evaluation(verdict, one.response_id))


def _outcome(judged: Sequence[Judged]) -> Attributes:
    decisions = [one.decision for one in judged]
    worst = max(decisions, key=lambda decision: decision.action.severity)
    # Choices of one prompt share it; the prompts of a batch have an id each.
    prompts = {one.response_id: one.decision.prompt_tokens or 0 for one in judged}
    found: Attributes = {
        "gen_ai.usage.input_tokens": sum(prompts.values()),
        "gen_ai.usage.output_tokens": sum(decision.reply_tokens or 0 for decision in decisions),
        "gen_ai.response.finish_reasons": [decision.finish_reason or "" for decision in decisions],
        "telltale.policy": worst.policy,
        "telltale.action": worst.action.value,
        "telltale.rules": _names(decisions, Mode.ENFORCE),
        "telltale.rules.shadow": _names(decisions, Mode.SHADOW),
        "telltale.positions": sum(decision.coverage.positions for decision in decisions),
        "telltale.positions.scored": sum(decision.coverage.scored for decision in decisions),
        "telltale.positions.gaps": sum(sum(decision.coverage.gaps.values()) for decision in decisions),
    }
    said: Mapping[str, str | None] = {"gen_ai.response.id": judged[0].response_id, "telltale.rule": worst.rule}
    return found | {name: value for name, value in said.items() if value is not None}


def _names(decisions: Sequence[Decision], mode: Mode) -> list[str]:
    return sorted({rule.name for decision in decisions for rule in decision.rules if rule.mode is mode})


def _evaluation(verdict: Verdict, response_id: str | None) -> Attributes:
    return dict(_said_of(verdict, response_id))


def _said_of(verdict: Verdict, response_id: str | None) -> Iterator[tuple[str, Any]]:
    yield "gen_ai.evaluation.name", verdict.detector
    yield "gen_ai.evaluation.score.label", _label(verdict)
    if verdict.statistic is not None:
        yield "gen_ai.evaluation.score.value", verdict.statistic
    if response_id is not None:
        yield "gen_ai.response.id", response_id
    yield "telltale.stage", verdict.stage.value
    yield "telltale.aggregate", verdict.aggregate
    if verdict.threshold is not None:
        yield "telltale.threshold", verdict.threshold


def _label(verdict: Verdict) -> str:
    if verdict.fired:
        return "fired"
    if verdict.statistic is None:
        return "not_scored"
    return "clear" if verdict.threshold is not None else "uncalibrated"
