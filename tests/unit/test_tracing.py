"""Spans of requests: what stands in them, what hangs under them, and what never does. Spans are kept in memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from monitor.events import ActedRule, Decision
from monitor.types import Action, Mode
from serving.api.middleware import MonitorMiddleware
from serving.api.request_ids import RequestIds
from serving.api.tracing import Tracing
from serving.origin import current_origin
from tests.unit.audit_trail import decision

CHAT, RAW = "/v1/chat/completions", "/v1/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PRIVATE = "swordfish"
Handler = Callable[[Request], Any]


class Traced:
    """An application behind our layers; its handler says how requests end."""

    def __init__(self, handler: Handler) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.seen: list[dict[str, str]] = []

        async def handle(request: Request) -> Response:
            self.seen.append(dict(request.headers))
            response: Response = await handler(request)
            return response

        routes = [Route(path, handle, methods=["GET", "POST"]) for path in (CHAT, RAW, "/tokenize")]
        self.app = RequestIds(MonitorMiddleware(Tracing(Starlette(routes=routes), provider=provider)))

    async def send(self, path: str = CHAT, *, body: Any = None, **headers: str) -> httpx2.Response:
        given = {"model": "tiny", "messages": [{"role": "user", "content": PRIVATE}]} if body is None else body
        transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=given, headers=headers)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    @property
    def span(self) -> ReadableSpan:
        (span,) = self.spans
        return span


def ending(*decisions: Decision, status: int = 200) -> Handler:
    async def handle(request: Request) -> Response:
        for number, one in enumerate(decisions):
            current_origin().tell(one, f"chatcmpl-{number}")
        return JSONResponse({}, status_code=status)

    return handle


async def test_a_span_says_what_was_asked_and_what_was_decided() -> None:
    traced = Traced(ending(decision(Action.BLOCK)))
    body = {"model": "tiny", "max_tokens": 5, "temperature": 0.5, "n": 1, "messages": [], "user": PRIVATE}
    await traced.send(body=body)
    span = traced.span
    assert (span.name, span.kind, span.parent) == ("chat tiny", SpanKind.SERVER, None)
    said = dict(span.attributes or {})
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.request.model"] == "tiny"
    assert (said["gen_ai.request.max_tokens"], said["gen_ai.request.temperature"]) == (5, 0.5)
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (5, 4)
    assert said["gen_ai.response.finish_reasons"] == ("stop",)
    assert (said["telltale.action"], said["telltale.rule"], said["telltale.rules"]) == (
        "block",
        "no-harm",
        ("no-harm",),
    )
    assert said["telltale.positions.gaps"] == 1
    # That something was blocked is no error.
    assert span.status.status_code is StatusCode.UNSET
    assert "error.type" not in said
    (event,) = span.events
    assert event.name == "gen_ai.evaluation.result"
    assert dict(event.attributes or {}) == {
        "gen_ai.evaluation.name": "harm",
        "gen_ai.evaluation.score.label": "fired",
        "gen_ai.evaluation.score.value": 1.25,
        "gen_ai.response.id": "chatcmpl-0",
        "telltale.stage": "prompt",
        "telltale.aggregate": "max",
        "telltale.threshold": 1.0,
    }
    assert PRIVATE not in span.to_json()


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"fired": True}, "fired"),
        ({"fired": False}, "clear"),
        ({"fired": False, "threshold": None}, "uncalibrated"),
        ({"fired": False, "statistic": None}, "not_scored"),
    ],
)
async def test_every_verdict_has_a_label_of_few(changes: dict[str, Any], label: str) -> None:
    event = decision()
    verdicts = tuple(verdict.model_copy(update=changes) for verdict in event.verdicts)
    traced = Traced(ending(event.model_copy(update={"verdicts": verdicts})))
    await traced.send()
    said = dict(traced.span.events[0].attributes or {})
    assert said["gen_ai.evaluation.score.label"] == label
    assert ("gen_ai.evaluation.score.value" in said) == (label != "not_scored")


async def test_the_worst_of_several_choices_counts_and_shadow_is_apart() -> None:
    shadow = decision(Action.FLAG).model_copy(
        update={
            "action": Action.ALLOW,
            "rule": None,
            "rules": (ActedRule(name="trial", action=Action.BLOCK, mode=Mode.SHADOW),),
        }
    )
    traced = Traced(ending(shadow, decision(Action.BLOCK)))
    await traced.send(body={"model": "tiny", "n": 2})
    said = dict(traced.span.attributes or {})
    assert (said["telltale.action"], said["telltale.rules"], said["telltale.rules.shadow"]) == (
        "block",
        ("no-harm",),
        ("trial",),
    )
    assert len(traced.span.events) == 2


async def test_the_clients_trace_is_ours_and_ours_is_handed_on() -> None:
    traced = Traced(ending(decision()))
    await traced.send(traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="vendor=1")
    span = traced.span
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert traced.seen[0]["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert traced.seen[0]["tracestate"] == "vendor=1"


async def test_without_a_trace_one_begins_and_is_handed_on() -> None:
    traced = Traced(ending(decision()))
    await traced.send(traceparent="nonsense")
    assert traced.span.context is not None
    assert traced.seen[0]["traceparent"].split("-")[1] == f"{traced.span.context.trace_id:032x}"


async def test_models_that_are_not_served_name_no_span() -> None:
    traced = Traced(ending(status=404))
    await traced.send(body={"model": "made-up-by-a-client"})
    assert traced.span.name == "chat"
    assert (traced.span.attributes or {})["http.response.status_code"] == 404
    assert traced.span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("body", [[], "text", {"model": 7, "n": "many", "temperature": None}, {}])
async def test_odd_bodies_are_left_to_the_server(body: Any) -> None:
    traced = Traced(ending(status=400))
    assert (await traced.send(RAW, body=body)).status_code == 400
    assert traced.span.name == "text_completion"


async def test_a_failure_of_the_server_is_an_error() -> None:
    traced = Traced(ending(status=503))
    await traced.send()
    assert (traced.span.status.status_code, (traced.span.attributes or {})["error.type"]) == (StatusCode.ERROR, "503")

    async def fail(request: Request) -> Response:
        raise ZeroDivisionError(PRIVATE)

    traced = Traced(fail)
    await traced.send()
    assert traced.span.status.status_code is StatusCode.ERROR
    assert PRIVATE not in traced.span.to_json()


async def test_a_stream_is_one_span_to_its_end_and_passes_unchanged() -> None:
    async def handle(request: Request) -> Response:
        async def parts() -> AsyncIterator[str]:
            yield "data: one\n\n"
            current_origin().tell(decision(), "chatcmpl-0")
            yield "data: [DONE]\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    traced = Traced(handle)
    response = await traced.send()
    assert response.text == "data: one\n\ndata: [DONE]\n\n"
    assert len(traced.span.events) == 1


async def test_what_makes_no_model_write_has_no_span_and_hears_the_body() -> None:
    async def echo(request: Request) -> Response:
        return JSONResponse(await request.json())

    traced = Traced(echo)
    assert (await traced.send("/tokenize", body={"a": 1})).json() == {"a": 1}
    assert traced.spans == []
    assert (await traced.send(CHAT, body={"a": 1})).json() == {"a": 1}
    assert len(traced.spans) == 1


async def test_requests_beside_each_other_keep_their_own_decisions() -> None:
    traced = Traced(ending(decision()))
    for _ in range(3):
        await traced.send()
    assert [len(span.events) for span in traced.spans] == [1, 1, 1]


async def test_without_tracing_nobody_keeps_decisions() -> None:
    kept: list[object] = []

    async def handle(request: Request) -> Response:
        current_origin().tell(decision(), None)
        kept.append(current_origin().decisions)
        return JSONResponse({})

    app = MonitorMiddleware(Starlette(routes=[Route(CHAT, handle, methods=["POST"])]))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        await client.post(CHAT, content=json.dumps({}))
    assert kept == [None]
