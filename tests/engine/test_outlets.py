"""A real server without an audit trail: its events go to sinks, its verdicts into traces, its logs are JSON."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from monitor.events import Decision
from monitor.sinks.signature import is_signed, parse_secret
from monitor.types import Action
from tests.engine.conftest import GUARDED
from tests.engine.test_serving import metric
from tests.support.server import Server, free_port, serving, telltale_command
from tests.support.sink_receiver import HANG, Receiver, receiving
from tests.support.tiny import TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KEY, SECRET = "sk-hidden-key", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PRIVATE = "the password is swordfish"
ADMIN = hashlib.sha256(b"sk-admin").hexdigest()
SINKS = f"""\
access: {{keys: [{{name: boss, key_sha256: {ADMIN}, scopes: [admin]}}]}}
tenants:
  - {{name: acme, key_sha256: {hashlib.sha256(KEY.encode()).hexdigest()}, policy: default}}
sinks:
  - {{name: siem, kind: webhook, url_env: SIEM_URL, secret_env: SIEM_SECRET}}
  - {{name: chat, kind: slack, url_env: CHAT_URL, min_action: block}}
  - {{name: stuck, kind: slack, url_env: STUCK_URL, min_action: allow, timeout_seconds: 30}}
"""


@dataclass(frozen=True)
class Watched:
    """A server, and those who are told."""

    server: Server
    siem: Receiver
    chat: Receiver
    traces: Receiver

    def ask(self, content: str, **headers: str) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 3, "temperature": 0}
        sent = {"authorization": f"Bearer {KEY}", **{name.replace("_", "-"): value for name, value in headers.items()}}
        return httpx.post(f"{self.server.url}/v1/chat/completions", json=body, headers=sent, timeout=60)

    def spans(self, name: str, count: int) -> list[Span]:
        """Those of our trace with this name, once there are so many."""
        deadline = time.monotonic() + 20
        while True:
            exported = [ExportTraceServiceRequest.FromString(got.body) for got in list(self.traces.got)]
            found = [
                span
                for request in exported
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
                if span.name == name and span.trace_id.hex() == TRACE
            ]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"{len(found)} spans {name!r}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def watched(tiny: TinyModel) -> Iterator[Watched]:
    folder = tiny.path.parent
    policy = folder / "outlets.yaml"
    policy.write_text(GUARDED + SINKS)
    with receiving() as siem, receiving() as chat, receiving([HANG] * 99) as stuck, receiving() as traces:
        address = traces.url.replace("/hook", "/v1/traces")
        environment = {
            "SIEM_URL": siem.url,
            "SIEM_SECRET": SECRET,
            "CHAT_URL": chat.url,
            "STUCK_URL": stuck.url,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": address,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        flags = ("--log-format", "json", "--tracing", "--otlp-traces-endpoint", address)
        command = telltale_command(tiny.path, policy, *flags)
        with serving(command, folder / "outlets.log", environment=environment) as server:
            yield Watched(server, siem, chat, traces)
            stuck.released.set()


def test_what_a_request_leaves_behind(watched: Watched, tiny: TinyModel) -> None:
    parent = f"00-{TRACE}-{PARENT}-01"
    fine = watched.ask(f"hello, {PRIVATE}", traceparent=parent, x_request_id="fine-1")
    blocked = watched.ask(f"{PRIVATE}{tiny.trigger_text} please", traceparent=parent, x_request_id="bad-1")
    assert [fine.status_code, blocked.status_code] == [200, 200]
    assert fine.headers["x-request-id"] == "fine-1"
    assert blocked.json()["id"] == "chatcmpl-bad-1"
    _sinks_are_told(watched, blocked.json()["id"])
    _verdicts_are_in_the_trace(watched, fine.json(), blocked.json())
    _logs_are_json_and_hold_no_secret(watched)


def _sinks_are_told(watched: Watched, blocked: str) -> None:
    watched.siem.wait_for(1)
    watched.chat.wait_for(1)
    (got,) = watched.siem.got
    assert is_signed(parse_secret(SECRET, where=""), got.headers, got.body, now=time.time())
    event = Decision.model_validate_json(json.dumps(got.content["data"]["event"]))
    assert (event.action, event.rule, event.finish_reason) == (Action.BLOCK, "no-trigger-prompt", "content_filter")
    assert got.content["data"]["request"]["client_request_id"] == blocked
    assert got.content["data"]["request"]["tenant"] == "acme"
    (told,) = watched.chat.got
    assert "block by no-trigger-prompt" in told.content["text"]
    assert PRIVATE.encode() not in got.body + told.body


def attributes(of: Any) -> dict[str, Any]:
    found = {}
    for item in of.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


def _verdicts_are_in_the_trace(watched: Watched, fine: Any, blocked: Any) -> None:
    spans = {attributes(span)["gen_ai.response.id"]: span for span in watched.spans("chat tiny", 2)}
    assert set(spans) == {fine["id"], blocked["id"]}
    assert {span.parent_span_id.hex() for span in spans.values()} == {PARENT}
    said = attributes(spans[blocked["id"]])
    assert (said["telltale.action"], said["telltale.rule"]) == ("block", "no-trigger-prompt")
    assert said["telltale.tenant"] == "acme"
    assert said["gen_ai.response.finish_reasons"] == ["content_filter"]
    # That something was blocked is no error.
    assert {span.status.code for span in spans.values()} == {0}
    said = attributes(spans[fine["id"]])
    assert said["gen_ai.usage.input_tokens"] == fine["usage"]["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == fine["usage"]["completion_tokens"]
    for span, label in ((spans[fine["id"]], "clear"), (spans[blocked["id"]], "fired")):
        results = [attributes(event) for event in span.events if event.name == "gen_ai.evaluation.result"]
        at_prompt = [one for one in results if one["telltale.stage"] == "prompt"]
        assert [(one["gen_ai.evaluation.name"], one["gen_ai.evaluation.score.label"]) for one in at_prompt] == [
            ("trigger", label)
        ]
        above = at_prompt[0]["gen_ai.evaluation.score.value"] > at_prompt[0]["telltale.threshold"]
        assert above == (label == "fired")
    # vLLM's own span hangs under ours.
    own = watched.spans("llm_request", 2)
    assert {span.parent_span_id for span in own} == {span.span_id for span in spans.values()}
    assert PRIVATE.encode() not in b"".join(got.body for got in watched.traces.got)


def _logs_are_json_and_hold_no_secret(watched: Watched) -> None:
    text = watched.server.log.read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert {line["event"] for line in lines} >= {"serving", "monitoring", "monitored", "sinks"}
    assert {line.get("process_name") for line in lines} >= {"APIServer", "EngineCore"}
    served = [line for line in lines if line.get("request_id") == "bad-1"]
    assert served
    assert {line["tenant"] for line in served} == {"acme"}
    assert all({"timestamp", "level"} <= line.keys() for line in lines)
    # Libraries print by themselves too: progress bars, warnings. Nothing that is logged is among it.
    others = [line for line in text.splitlines() if not line.startswith("{")]
    assert [line for line in others if re.match(r"\S*\s*(INFO|WARNING|ERROR)\b|\d{4}-\d\d-\d\d|telltale:", line)] == []
    for secret in (PRIVATE, KEY, SECRET, watched.siem.url, watched.chat.url):
        assert secret not in text


def test_a_sink_that_hangs_holds_up_no_request(watched: Watched) -> None:
    began = time.monotonic()
    for _ in range(20):
        assert watched.ask("hello").status_code == 200
    assert time.monotonic() - began < 20
    assert metric(watched.server, "telltale_sink_queue", sink="stuck") >= 20
    assert metric(watched.server, "telltale_sink_delivered_total", sink="siem") == 1
    assert metric(watched.server, "telltale_sink_delivered_total", sink="stuck") == 0


def test_top_shows_the_running_server(watched: Watched) -> None:
    telltale = telltale_command(Path(), Path())[0]
    shown = subprocess.run(
        [telltale, "top", "--once", "--url", watched.server.url],
        env={"COLUMNS": "160", "TELLTALE_API_KEY": KEY, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert shown.startswith("ready; canary passes")
    assert "coverage 100.0000%" in shown
    assert any("no-trigger-prompt" in line and "block" in line for line in shown.splitlines())
    gone = [telltale, "top", "--once", "--url", f"http://127.0.0.1:{free_port()}"]
    failed = subprocess.run(gone, capture_output=True, text=True, timeout=60, check=False)
    assert failed.returncode == 2
    assert "does not answer" in failed.stderr
