"""Rollouts: the share that was asked for, the same people at every start, and nobody thrown out when it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from prometheus_client import CollectorRegistry
from scipy.stats import binom
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from monitor.exporter import Exporter
from monitor.monitor import Monitor
from monitor.report import make_report, take_tally
from monitor.rollout import Share, Subject, Subjects
from monitor.types import Action, Mode
from monitor.yaml_file import PolicyError
from probes.card import Format
from serving.api.callers import Callers
from serving.api.keyring import digest_of
from serving.api.middleware import MonitorMiddleware
from serving.engine.trust import ROLLOUT_VARIABLE, ensure_rollout_key, rollout_key
from serving.origin import current_origin
from tests.unit.artifacts import make_card, plan_of, policy_text, unit_artifact
from tests.unit.script import Script, chat

KEY = b"a key of the server"
subjects = st.builds(Subjects, st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))


@pytest.mark.parametrize("percent", [0.1, 1, 10, 50, 90, 99.9])
@pytest.mark.parametrize("by", Subject)
def test_the_share_is_the_one_asked_for(percent: float, by: Subject) -> None:
    """20,000 subjects: the count lies within the bounds that a fair draw leaves once in a million."""
    number = 20_000
    drawn = [Subjects(f"tenant-{n}", f"session-{n}", f"request-{n}") for n in range(number)]
    inside = sum(Share(percent, by).holds(KEY, "rule", subject) for subject in drawn)
    low, high = binom.ppf([5e-7, 1 - 5e-7], number, percent / 100)
    assert low <= inside <= high


@given(subject=subjects, by=st.sampled_from(Subject), low=st.floats(0, 100), high=st.floats(0, 100))
def test_whoever_is_in_stays_in_when_it_grows(subject: Subjects, by: Subject, low: float, high: float) -> None:
    low, high = sorted((low, high))
    inside, later = (Share(percent, by).holds(KEY, "rule", subject) for percent in (low, high))
    assert not inside or later
    assert not Share(0, by).holds(KEY, "rule", subject)
    assert Share(100, by).holds(KEY, "rule", subject)


@given(subject=subjects, other=subjects)
def test_only_the_subject_counts(subject: Subjects, other: Subjects) -> None:
    """A tenant's requests and sessions are all in or all out; another session is no other tenant."""
    same_tenant = Subjects(subject.tenant, other.session, other.request)
    same_session = Subjects(subject.tenant, subject.session, other.request)
    for percent in (10, 50):
        for by, alike in ((Subject.TENANT, same_tenant), (Subject.SESSION, same_session)):
            share = Share(percent, by)
            assert share.holds(KEY, "rule", subject) == share.holds(KEY, "rule", alike)


def test_the_draw_hangs_on_key_and_rule_and_is_the_same_in_every_process() -> None:
    drawn = [Subjects(f"tenant-{n}") for n in range(400)]

    def inside(key: bytes, rule: str) -> list[bool]:
        return [Share(50, Subject.TENANT).holds(key, rule, subject) for subject in drawn]

    first = inside(KEY, "rule")
    for other in (inside(b"another", "rule"), inside(KEY, "another")):
        assert 120 < np.count_nonzero(np.array(first) != np.array(other)) < 280
    # Pinned: a release that drew anew would throw out tenants who are in.
    assert "".join("01"[value] for value in first[:32]) == "10111011011011111110010001010100"


def test_parts_of_a_subject_do_not_run_into_each_other() -> None:
    pairs = [(Subjects(f"a{n}", "b"), Subjects("a", f"{n}b")) for n in range(200)]
    share = Share(50, Subject.SESSION)
    assert len({(share.holds(KEY, "r", left), share.holds(KEY, "r", right)) for left, right in pairs}) == 4


def rolled_out(percent: float, by: str, *, action: str = "block") -> str:
    when = "{detector: harm, stage: prompt, aggregate: {kind: max}, above: {value: 0.5}}"
    return (
        f"{{name: r, when: {when}, do: {{action: {action}}}, mode: enforce, rollout: {{percent: {percent}, by: {by}}}}}"
    )


def artifacts(formats: tuple[Format, ...] = tuple(Format)) -> dict[str, Any]:
    return {"harm": unit_artifact(make_card(formats=formats))}


@settings(max_examples=30, deadline=None)
@given(number=st.integers(0, 10**6))
def test_outside_a_rule_is_counted_as_what_it_would_have_done(
    tmp_path_factory: pytest.TempPathFactory, number: int
) -> None:
    plan = plan_of(tmp_path_factory.mktemp("plan"), policy_text(rolled_out(50, "tenant")), artifacts())
    monitor, script = Monitor(plan, rollout_key=KEY), Script(plan)
    who = Subjects(f"tenant-{number}", "", "some request")
    for name in ("0_x", "1_x", "again"):  # choices of one request, and one that tries again
        request = who if name != "again" else Subjects(who.tenant, "other", "another request")
        monitor.admit(name, num_prompt=2, policy=None, fmt=Format.CHAT, prompt=chat(2), subjects=request)
        monitor.observe(script.step([(name, range(2), script.rows([0, 9]))]))
    inside = Share(50, Subject.TENANT).holds(KEY, "r", who)
    live = [monitor.get(name) for name in ("0_x", "1_x", "again")]
    assert [item is not None and item.action.action for item in live] == [Action.BLOCK if inside else Action.ALLOW] * 3
    exporter = Exporter(plan, registry := CollectorRegistry())
    exporter.record(make_report(monitor, [], [], take_tally(monitor, [])))
    for mode, count in ((Mode.ENFORCE, 3 * inside), (Mode.SHADOW, 3 * (not inside))):
        labels = {"rule": "r", "action": "block", "mode": mode.value, "policy": "default"}
        assert registry.get_sample_value("telltale_actions_total", labels) == count


def test_choices_share_a_draw_by_request_and_tries_do_not(tmp_path: Path) -> None:
    monitor = Monitor(plan_of(tmp_path, policy_text(rolled_out(50, "request")), artifacts()), rollout_key=KEY)
    outside = []
    for number in range(64):
        who = Subjects("t", "s", f"request-{number}")
        drawn = {
            "r" in monitor.admit(f"{child}_{number}", num_prompt=1, policy=None, fmt=Format.CHAT, subjects=who).outside
            for child in range(3)
        }
        assert len(drawn) == 1
        outside += drawn
    assert 16 < sum(outside) < 48


def test_a_request_that_nobody_vouches_for_is_inside(tmp_path: Path) -> None:
    monitor = Monitor(plan_of(tmp_path, policy_text(rolled_out(0, "tenant")), artifacts()), rollout_key=KEY)
    assert not monitor.admit("a", num_prompt=1, policy=None, fmt=Format.RAW).outside
    assert monitor.admit("b", num_prompt=1, policy=None, fmt=Format.RAW, subjects=Subjects()).outside == {"r"}


@pytest.mark.parametrize(("percent", "expected"), [(0, Action.ALLOW), (100, Action.BLOCK)])
def test_who_is_outside_needs_no_calibration(tmp_path: Path, percent: float, expected: Action) -> None:
    text = policy_text(rolled_out(percent, "tenant"), policy="on_uncalibrated: block")
    monitor = Monitor(plan_of(tmp_path, text, artifacts((Format.CHAT,))), rollout_key=KEY)
    request = monitor.admit("a", num_prompt=1, policy=None, fmt=Format.RAW, subjects=Subjects("t"))
    assert request.action.action is expected


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (rolled_out(101, "tenant"), "rules[0].rollout.percent: is 101: "),
        (rolled_out(10, "user"), "rollout.by: is 'user'. Known: request, session, tenant."),
        (rolled_out(10, "tenant").replace("enforce", "shadow"), "rules[0]: 'rollout' says for whom the rule is"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, rules: str, words: str) -> None:
    with pytest.raises(PolicyError) as caught:
        plan_of(tmp_path, policy_text(rules), artifacts())
    assert words in str(caught.value)


def test_the_key_is_kept_if_it_is_set() -> None:
    environment: dict[str, str] = {}
    assert not ensure_rollout_key(environment)
    first = rollout_key(environment)
    assert ensure_rollout_key(environment)
    assert rollout_key(environment) == first
    assert rollout_key({ROLLOUT_VARIABLE: "mine"}) == b"mine"
    with pytest.raises(RuntimeError, match=ROLLOUT_VARIABLE):
        rollout_key({})


async def who(request: Request) -> Response:
    caller = current_origin().caller
    return PlainTextResponse(f"{caller.tenant}|{caller.session}")


def test_only_a_key_that_is_asked_for_makes_a_tenant() -> None:
    """Else a client could be another tenant with each request, and so get out of every rollout."""
    callers = Callers()
    app = MonitorMiddleware(Starlette(routes=[Route("/v1/models", who)]), callers=callers)
    client = TestClient(app)

    def asked(key: str | None, **headers: str) -> str:
        given = {"authorization": key} if key is not None else {}
        return client.get("/v1/models", headers=given | headers).text

    assert {asked(key) for key in (None, "Bearer one", "Bearer two")} == {"|"}
    callers.accept({}, [digest_of("one"), digest_of("two")])
    keys = ("Bearer one", "Bearer two", "bearer one", "Bearer three", "Basic one", "Bearer ", None)
    first, second, again, *others = (asked(key) for key in keys)
    assert first == again != second
    assert first.startswith("key:")
    assert "one" not in first
    assert set(others) == {"|"}
    sessions = [asked("Bearer one", **{"x-telltale-session": name}) for name in ("s", "t" * 5000)]
    assert sessions[0] != sessions[1]
    assert all(len(text) == len(first) + 64 for text in sessions)
