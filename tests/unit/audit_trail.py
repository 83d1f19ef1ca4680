"""Events, keys and filled stores for the tests of the audit trail."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from monitor.audit.key import AuditKey
from monitor.audit.record import AuditRecord, Chain
from monitor.audit.settings import AuditSettings
from monitor.audit.store import Store, open_store
from monitor.events import (
    ActedRule,
    Content,
    CoverageRecord,
    Decision,
    Event,
    Started,
    Stopped,
    Verdict,
)
from monitor.types import Action, Gap, Mode, Skip
from probes.card import Format, Stage

KEY = AuditKey(bytes(range(32)))
OTHER_KEY = AuditKey(bytes(32))
SCHEMES = ("sqlite", "jsonl")


def url_of(scheme: str, folder: Path) -> str:
    return f"{scheme}:///{folder / ('trail.db' if scheme == 'sqlite' else 'trail')}"


def new_store(scheme: str, folder: Path) -> Store:
    return open_store(url_of(scheme, folder), make=True)


def settings_of(scheme: str, folder: Path, **changes: object) -> AuditSettings:
    given = json.dumps({"url": url_of(scheme, folder), **changes})
    return AuditSettings.model_validate_json(given).resolved(folder)


def decision(action: Action = Action.FLAG, *, time: datetime | None = None) -> Decision:
    fired = action is not Action.ALLOW
    return Decision(
        time=time or datetime.now(UTC),
        plan="a" * 64,
        policy="default",
        artifacts={"harm": "b" * 64},
        format=Format.CHAT,
        action=action,
        rule="no-harm" if fired else None,
        rules=(ActedRule(name="no-harm", action=action, mode=Mode.ENFORCE),) if fired else (),
        verdicts=(
            Verdict(
                detector="harm",
                stage=Stage.PROMPT,
                aggregate="max",
                statistic=1.25,
                threshold=1.0,
                fired=fired,
                fired_at=4 if fired else None,
            ),
        ),
        coverage=CoverageRecord(positions=9, scored=6, skipped={Skip.SINK: 1, Skip.FINAL: 1}, gaps={Gap.UNSEEN: 1}),
        prompt_tokens=5,
        reply_tokens=4,
        finish_reason="stop",
    )


def content(number: int = 0, *, tenant: str | None = None) -> Content:
    return Content(
        request_id=f"chatcmpl-{number}-x",
        client_request_id=f"chatcmpl-{number}",
        tenant=tenant,
        prompt=f"Grüße, \u2603 {number}",
        reply='"quoted"\n\0',
    )


def chain_of(
    count: int, *, key: AuditKey = KEY, writer: str | None = None, times: Sequence[datetime] = (), tenant: str = "acme"
) -> tuple[Chain, list[AuditRecord]]:
    """A chain that begins, has ``count`` decisions, and ends."""
    chain = Chain(key, writer)
    events: list[tuple[Event, Content | None]] = [
        (Started(program="test", **({"time": times[0]} if times else {})), None)
    ]
    for number in range(count):
        when = times[number] if times else None
        events.append((decision(time=when), content(number, tenant=tenant if number % 2 else None)))
    records = [chain.add(event, about) for event, about in events]
    records.append(chain.add(Stopped(**({"time": times[-1]} if times else {})), None))
    return chain, records


class Watch:
    """Counts what a writer says."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.lost = 0
        self.failures = 0
        self.most_waiting = 0

    def stored(self, kind: str, seconds: float) -> None:
        assert seconds >= 0
        self.kinds.append(kind)

    def waiting(self, count: int) -> None:
        self.most_waiting = max(self.most_waiting, count)

    def dropped(self, count: int) -> None:
        self.lost += count

    def failed(self) -> None:
        self.failures += 1
