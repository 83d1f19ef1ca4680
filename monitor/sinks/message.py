"""What is sent of an event: our JSON, or a text for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID, uuid4

from monitor.events import (
    CanaryFailed,
    Content,
    ConversationFired,
    Decision,
    Event,
    GapSeen,
    Handled,
    PolicyReloaded,
    ProbingSuspected,
)
from monitor.sinks.settings import SinkKind

_WHOSE = {"request_id", "client_request_id", "tenant"}
"""All of a content that may leave without its sink being allowed texts."""
_SLACK_CHARACTERS = 3000
"""Slack cuts longer texts by itself, somewhere."""


@dataclass(frozen=True, slots=True)
class Message:
    """What goes over the wire.

    Attributes:
        id: of the event, the same for every attempt: by it a receiver knows what it has had already.
        body: JSON.
    """

    id: str
    body: bytes


def message_of(kind: SinkKind, event: Event, content: Content | None, *, text: bool) -> Message:
    """What a sink of this kind gets of an event.

    Args:
        kind: of the sink.
        event: what happened.
        content: whose request it was, and what the audit trail would keep of its texts.
        text: whether those texts may leave.
    """
    about = content.model_dump(mode="json", include=None if text else _WHOSE) if content is not None else None
    if kind is SinkKind.SLACK:
        return _encoded(event.id, _slack(event, about))
    head = _json({"type": f"telltale.{event.kind}", "timestamp": event.time.isoformat()})
    # The event may have hundreds of verdicts, and is spelled already where there is an audit trail.
    body = f'{head[:-1]},"data":{{"event":{event.spelled},"request":{_json(about)}}}}}'
    return Message(str(event.id), body.encode())


def trial_message(kind: SinkKind, sink: str) -> Message:
    """What tells a receiver that it can be reached, and its people that nothing has happened."""
    number, now = uuid4(), datetime.now(UTC)
    body: dict[str, object] = {"type": "telltale.test", "timestamp": now.isoformat(), "data": {"sink": sink}}
    if kind is SinkKind.SLACK:
        body = {"text": f"Telltale: a test of the sink {sink}. Nothing has happened."}
    return _encoded(number, body)


def _encoded(number: UUID, body: Mapping[str, object]) -> Message:
    return Message(str(number), _json(body).encode())


def _json(content: Mapping[str, object] | None) -> str:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=True)


def _slack(event: Event, about: Mapping[str, object] | None) -> dict[str, object]:
    lines = _lines(event)
    if about is not None:
        whose = [f"request {about['client_request_id'] or about['request_id']}"]
        whose += [f"tenant {about['tenant']}"] if about["tenant"] is not None else []
        lines.append(", ".join(whose))
        lines += [f"{name}: {about[name]}" for name in ("prompt", "reply") if about.get(name)]
    lines.append(f"event {event.id}, {event.time:%Y-%m-%d %H:%M:%S} UTC")
    return {"text": _escaped("\n".join(lines))[:_SLACK_CHARACTERS]}


def _lines(event: Event) -> list[str]:
    if isinstance(event, Decision):
        return _decision(event)
    said: list[str] = [event.kind]
    match event:
        case Handled():
            said = [f"{event.action.value} by {event.rule} (policy {event.policy}): {event.outcome.value}"]
        case ConversationFired():
            what = f"{event.action.value} by {event.rule} (policy {event.policy}, {event.mode.value})"
            said = [f"a conversation: {what}", f"{event.detector}, {event.requests} requests"]
        case ProbingSuspected():
            what = f"{event.near} of {event.requests} requests lie near a threshold of {event.detector}"
            said = [f"probing? {what} (policy {event.policy}, {event.stage.value})"]
        case GapSeen():
            gaps = ", ".join(f"{reason.value} {count}" for reason, count in event.gaps.items())
            said = [f"positions were not scored: {gaps}"]
        case CanaryFailed():
            said = [f"the canary fails: {event.reason.value}", event.detail]
        case PolicyReloaded():
            fixed = f": {event.setting} is fixed at the start" if event.setting is not None else ""
            said = [f"a policy by {event.source.value}: {event.outcome.value}{fixed}"]
        case _:
            pass
    return [f"Telltale: {said[0]}", *said[1:]]


def _decision(event: Decision) -> list[str]:
    by = f" by {event.rule}" if event.rule is not None else ""
    lines = [f"Telltale: {event.action.value}{by} (policy {event.policy}, {event.format.value})"]
    lines += _said("rules", [f"{rule.name} {rule.action.value}, {rule.mode.value}" for rule in event.rules])
    fired = (verdict for verdict in event.verdicts if verdict.fired)
    lines += _said("fired", [f"{verdict.detector} at {verdict.stage.value}" for verdict in fired])
    return lines


def _said(what: str, parts: Sequence[str]) -> list[str]:
    return [f"{what}: {'; '.join(parts)}"] if parts else []


def _escaped(text: str) -> str:
    """Slack's three: else a client could call a channel together by what it calls its request."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
