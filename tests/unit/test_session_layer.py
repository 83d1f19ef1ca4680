"""Sessions in the API process: the next request finds what the one before it left, and faults follow the file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from monitor.events import ConversationFired
from monitor.policy import Plan
from monitor.rollout import Subject
from monitor.session import Session
from monitor.sessions.memory import MemoryStore
from monitor.sessions.metrics import SessionMetrics
from monitor.sessions.settings import SessionSettings
from monitor.sessions.store import Change, SessionKey, SessionStore, SessionStoreError
from monitor.types import ON_SESSION_FAILURE, Action
from probes.card import Format
from serving.api.callers import Callers
from serving.api.middleware import MonitorMiddleware
from serving.api.sessions import Sessions, needs_sessions, open_sessions, require_shared
from serving.engine.records import Record
from serving.engine.turns import Turns
from serving.origin import Caller, current_origin
from serving.sitting import Reading, Sitting
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, unit_artifact
from tests.unit.test_ledger import Trail
from tests.unit.test_session_rules import ANOTHER, WHEN, over

RULES = f"{over('stop', 'action: block, until: 60s')}\n{over('note', 'action: flag', f'{WHEN}, by: tenant')}"


def plan(folder: Path, rules: str = RULES, head: str = "") -> Plan:
    card = make_card(calibrations=[calibration()], formats=[Format.CHAT])
    return plan_of(folder, policy_text(rules, head=head), {"harm": unit_artifact(card)})


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


class Broken(SessionStore):
    """A store somewhere else, with a fault: each call waits, then fails."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    @property
    def is_remote(self) -> bool:
        return True

    def read(self, key: SessionKey, now: float) -> Session | None:
        return self._fail()

    def update(self, key: SessionKey, change: Change, now: float) -> Session:
        return self._fail()

    def close(self) -> None: ...

    def _fail(self) -> Session:
        time.sleep(self._seconds)
        raise SessionStoreError("the wire is cut")


class Far(MemoryStore):
    """Memory that is somewhere else: each call takes its time in a thread."""

    @property
    def is_remote(self) -> bool:
        return True

    def update(self, key: SessionKey, change: Change, now: float) -> Session:
        time.sleep(0.05)
        return super().update(key, change, now)


async def reply(request: Request) -> Response:
    """As the engine's side does: a request ends with a statistic, then its reply is sent."""
    asked, made = await request.json(), request.app.state.plan
    sitting = current_origin().sitting
    imposed = sitting.imposed if sitting is not None else None
    if sitting is not None and "statistic" in asked:
        statistics = [asked["statistic"]] * len(made.checks)
        sitting.take(Reading("r", made, 0, Format(asked.get("format", "chat")), statistics))
    if not asked.get("stream"):
        return JSONResponse({"imposed": imposed})

    async def parts() -> AsyncIterator[str]:
        yield str(imposed)

    return StreamingResponse(parts())


def client_of(sessions: Sessions | None, made: Plan) -> TestClient:
    app = Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])])
    app.state.plan = made
    return TestClient(MonitorMiddleware(app, callers=Callers(), sessions=lambda: sessions))


def ask(client: TestClient, session: str | None = "s", **body: Any) -> Any:
    headers = {"x-telltale-session": session} if session else {}
    return client.post("/v1/chat/completions", json=body, headers=headers).json()["imposed"]


def sessions_of(
    folder: Path, store: SessionStore | None = None, *, registry: CollectorRegistry | None = None, **settings: Any
) -> tuple[Sessions, Clock, CollectorRegistry]:
    made, clock, registry = plan(folder), Clock(), registry or CollectorRegistry()
    store = store or MemoryStore(SessionSettings())
    return Sessions(lambda: made, store, SessionMetrics(registry), clock=clock, **settings), clock, registry


@pytest.mark.parametrize("kind", [MemoryStore, Far])
def test_the_next_request_finds_what_the_one_before_left(tmp_path: Path, kind: Callable[..., SessionStore]) -> None:
    sessions, clock, registry = sessions_of(tmp_path, kind(SessionSettings()))
    with client_of(sessions, plan(tmp_path)) as client:
        assert ask(client, statistic=3.0) == []
        assert ask(client, "another", statistic=1.0) == []
        assert ask(client, statistic=3.0) == []
        assert ask(client) == ["stop", "note"]  # the tenant's own sum is 7 by now
        assert ask(client, "another") == ["note"]
        assert ask(client, None) == ["note"]
        clock.now += 60
        assert ask(client) == ["note"]
        assert ask(client, statistic=0.0) == ["note"]  # still above: it fires again
        assert ask(client) == ["stop", "note"]
        clock.now += 3600
        assert ask(client) == []
    for rule, count in (("stop", 2), ("note", 1)):
        labels = {"rule": rule, "action": "block" if rule == "stop" else "flag", "mode": "enforce", "policy": "default"}
        assert registry.get_sample_value("telltale_session_rules_fired_total", labels) == count
    assert registry.get_sample_value("telltale_session_requests_total", {"named": "no"}) == 1
    assert registry.get_sample_value("telltale_session_requests_total", {"named": "yes"}) == 9


def test_a_stream_ends_when_its_session_knows_of_it(tmp_path: Path) -> None:
    sessions, *_ = sessions_of(tmp_path, Far(SessionSettings()))
    with client_of(sessions, plan(tmp_path)) as client:
        for _ in range(5):
            headers = {"x-telltale-session": "s"}
            said = client.post("/v1/chat/completions", json={"statistic": 9.0, "stream": True}, headers=headers).text
        assert said == "('stop', 'note')"


def test_a_format_that_the_card_does_not_list_adds_nothing(tmp_path: Path) -> None:
    sessions, *_ = sessions_of(tmp_path)
    with client_of(sessions, plan(tmp_path)) as client:
        ask(client, statistic=99.0, format="raw")
        assert ask(client) == []


def test_without_such_a_rule_nothing_is_remembered(tmp_path: Path) -> None:
    made = plan(tmp_path, ANOTHER)
    assert not needs_sessions(made)
    unneeded = open_sessions(lambda: made, SessionSettings(), CollectorRegistry())
    assert asyncio.run(unneeded.begin(Caller("t", "s"))) is None
    with client_of(None, made) as client:
        assert ask(client, statistic=99.0) is None
    # Another policy of the same file may have one.
    sessions, *_ = sessions_of(tmp_path)
    assert asyncio.run(sessions.begin(Caller("t", "s", "default"))) is not None


@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_a_store_that_fails_or_hangs_is_said_and_counted(tmp_path: Path, seconds: float) -> None:
    sessions, _, registry = sessions_of(tmp_path, Broken(seconds), patience=0.2)
    with client_of(sessions, plan(tmp_path)) as client:
        began = time.monotonic()
        assert ask(client, statistic=9.0) == [ON_SESSION_FAILURE]
        assert time.monotonic() - began < 3
    for operation, count in (("read", 1), ("update", 2)):
        labels = {"operation": operation}
        assert registry.get_sample_value("telltale_session_store_errors_total", labels) == count


def test_concurrent_requests_of_a_session_lose_nothing(tmp_path: Path) -> None:
    sessions, *_ = sessions_of(tmp_path)
    made = plan(tmp_path)

    async def all_at_once() -> tuple[str, ...]:
        caller = Caller("t", "s")
        sittings = [sitting for _ in range(20) if (sitting := await sessions.begin(caller)) is not None]
        for number, sitting in enumerate(sittings):
            sitting.take(Reading(f"r{number}", made, 0, Format.CHAT, [0.3, 0.3]))
        assert [sitting.imposed for sitting in sittings] == [()] * 20
        for sitting in sittings:
            await sitting.settled()
        found = await sessions.begin(caller)
        assert found is not None
        return found.imposed

    assert asyncio.run(all_at_once()) == ("stop", "note")  # 20 times 0.3 is 6, and each alone is far from 5


def test_a_client_that_leaves_takes_nothing_back(tmp_path: Path) -> None:
    sessions, *_ = sessions_of(tmp_path, Far(SessionSettings()))

    made = plan(tmp_path)

    async def leaves() -> tuple[str, ...]:
        sitting = await sessions.begin(Caller("t", "s"))
        assert sitting is not None
        sitting.take(Reading("r", made, 0, Format.CHAT, [9.0, 9.0]))
        waiting = asyncio.ensure_future(sitting.settled())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.sleep(0.3)
        found = await sessions.begin(Caller("t", "s"))
        assert found is not None
        return found.imposed

    assert asyncio.run(leaves()) == ("stop", "note")


def test_several_processes_need_a_store_that_they_share(tmp_path: Path) -> None:
    made, alone = plan(tmp_path), SessionSettings()
    with pytest.raises(SessionStoreError, match="would each remember a part of every conversation"):
        require_shared(made, alone, processes=2)
    require_shared(made, alone, processes=1)
    require_shared(plan(tmp_path, ANOTHER), alone, processes=2)
    require_shared(made, SessionSettings(url="postgresql://h/d", on_failure=Action.BLOCK), processes=2)


def test_what_was_remembered_goes_on_under_another_policy(tmp_path: Path) -> None:
    """A reload: another threshold acts on what the sessions were like before; requests end under the plan they had."""
    running = [plan(tmp_path, ANOTHER)]
    sessions = Sessions(lambda: running[0], MemoryStore(SessionSettings()), SessionMetrics(CollectorRegistry()))

    async def request(statistic: float, under: Plan | None = None) -> tuple[str, ...] | None:
        sitting = await sessions.begin(Caller("t", "s"))
        if sitting is None:
            return None
        made = under or running[0]
        sitting.take(Reading("r", made, 0, Format.CHAT, [statistic] * len(made.checks)))
        await sitting.settled()
        return sitting.imposed

    async def story() -> list[tuple[str, ...] | None]:
        said = [await request(9.0)]
        high = plan(tmp_path, over("stop", when=WHEN.replace("5", "50")))
        running[0] = high
        said += [await request(4.0), await request(4.0)]
        running[0] = plan(tmp_path, over("stop"))
        said += [await request(0.0, under=high), await request(0.0), await request(0.0)]
        running[0] = plan(tmp_path, ANOTHER)
        return [*said, await request(0.0)]

    assert asyncio.run(story()) == [None, (), (), (), (), ("stop",), None]


def test_what_fires_is_an_event_that_its_response_waits_for(tmp_path: Path) -> None:
    trail = Trail(tmp_path, rules=RULES.replace("of: prompt", "of: prompt, aggregate: {kind: max}"))
    registry = CollectorRegistry()
    sessions = Sessions(
        lambda: trail.plan, MemoryStore(SessionSettings()), SessionMetrics(registry), ledger=lambda: trail.ledger
    )

    async def fire() -> Sitting:
        sitting = await sessions.begin(Caller("acme", "s"))
        assert sitting is not None
        sitting.take(Reading("the-request", trail.plan, 0, Format.CHAT, [7.5] * len(trail.plan.checks)))
        await sitting.settled()
        return sitting

    sitting = asyncio.run(fire())
    assert len(sitting.tickets) == 2
    (first, content), (second, _) = trail.events()
    assert isinstance(first, ConversationFired)
    assert (first.rule, first.value, first.threshold, first.requests) == ("stop", 7.5, 5.0, 1)
    assert first.until is not None
    assert isinstance(second, ConversationFired)
    assert (second.rule, second.until) == ("note", None)
    assert content is not None
    assert (content.request_id, content.tenant) == ("the-request", "acme")


class Taken:
    """A sitting that keeps what it is given."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.sitting = Sitting("t", {Subject.TENANT: SessionKey.of("t", None)}, (), self._commit)

    async def _commit(self, sitting: Sitting, reading: Reading) -> None:
        self.readings.append(reading)


def record(made: Plan, *statistics: float) -> Record:
    found = Record(made)
    found.fmt, found.statistics = Format.CHAT, list(statistics)
    return found


def test_choices_are_one_request_and_the_worst_counts(tmp_path: Path) -> None:
    made, turns, taken = plan(tmp_path), Turns(), Taken()

    async def run() -> None:
        turns.begin("cmpl-1", 3, taken.sitting)
        turns.begin("cmpl-2", 1, taken.sitting)
        turns.ended("0_cmpl-1", record(made, 1.0, float("-inf")))
        turns.ended("2_cmpl-1", record(made, 0.5, 2.0))
        turns.ended("0_cmpl-1", record(made, 9.0, 9.0))  # told twice, by vLLM and by the engine
        await taken.sitting.settled()
        assert not taken.readings
        turns.left({"1_cmpl-1": record(made, float("nan"), -3.0), "unknown": record(made, 5.0, 5.0)})
        turns.left({"cmpl-2": record(made)})  # it was never read
        await taken.sitting.settled()

    asyncio.run(run())
    assert [(found.request_id, found.statistics) for found in taken.readings] == [("cmpl-1", [1.0, 2.0])]
    assert len(turns) == 0
