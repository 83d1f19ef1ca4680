"""Whoever probes a threshold is told of soon, benign tenants as rarely as was asked for, and nobody is stopped."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from scipy.stats import poisson

from monitor.events import ProbingSuspected
from monitor.policy import Plan
from monitor.probing import Probing, band_of
from monitor.sessions.settings import SessionSettings
from probes.card import Format
from serving.api.sessions import needs_sessions, open_sessions
from serving.origin import Caller
from serving.sitting import Reading
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.test_ledger import Trail

BENIGN = np.random.default_rng(5).standard_normal(1000)
TOP = sorted(BENIGN.tolist(), reverse=True)[:80]
CALIBRATION = calibration(threshold=2.3, top_scores=TOP, num_benign=1000)


def plan(folder: Path, *, every: int = 10_000, rules: str = "") -> Plan:
    policy = f"probing: {{false_alarm_every: {every}}}"
    card = make_card(calibrations=[CALIBRATION], formats=[Format.CHAT])
    return plan_of(folder, policy_text(rules or rule("p"), policy=policy), {"harm": unit_artifact(card)})


def test_the_band_holds_as_many_benign_requests_as_it_says() -> None:
    band = band_of(CALIBRATION, 2.3, 0)
    assert band is not None
    assert band.low < 2.3 < band.high
    fresh = np.random.default_rng(6).standard_normal(200_000)
    assert np.mean((fresh > band.low) & (fresh <= band.high)) <= band.benign < 0.25
    assert band.benign < band.probing <= 0.5


@pytest.mark.parametrize("wrong", [{"top_scores": (9.0, 8.0)}, {"num_benign": 60}])
def test_where_the_card_knows_too_little_nothing_is_watched(wrong: dict[str, object]) -> None:
    assert band_of(CALIBRATION.model_copy(update=wrong), 2.3, 0) is None


def test_benign_tenants_are_told_of_as_rarely_as_was_asked_for(tmp_path: Path) -> None:
    """150,000 benign requests of three tenants: at most what one false alarm in 2,000 leaves room for."""
    probing = Probing(plan(tmp_path, every=2000))
    drawn = np.random.default_rng(7).standard_normal(150_000)
    alarms = sum(len(probing.see("abc"[n % 3], 0, Format.CHAT, [x])) for n, x in enumerate(drawn.tolist()))
    assert alarms <= poisson.ppf(0.999, 150_000 / 2000)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_prober_is_told_of_within_a_few_dozen_requests(tmp_path: Path, share: float) -> None:
    probing, rng = Probing(plan(tmp_path, every=1_000_000)), np.random.default_rng(8)
    for _ in range(60):
        near = rng.random() < share
        found = probing.see("t", 0, Format.CHAT, [rng.uniform(2.1, 2.5) if near else rng.standard_normal()])
        if found:
            assert found[0].near / found[0].requests > 0.4
            return
    raise AssertionError("60 requests, and nobody noticed")


def test_far_above_is_no_probing_and_tenants_are_apart(tmp_path: Path) -> None:
    probing = Probing(plan(tmp_path, every=100))
    assert not any(probing.see("harmful", 0, Format.CHAT, [50.0]) for _ in range(500))
    assert len(probing) == 0
    alarms = {who: 0 for who in ("near", "never")}
    for number in range(60):
        alarms["near"] += len(probing.see("near", 0, Format.CHAT, [2.2]))
        alarms["never"] += len(probing.see("never", 0, Format.CHAT, [0.0 if number % 2 else -9.0]))
    assert alarms["near"] > 1  # it is watched anew after each
    assert alarms["never"] == 0


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    probing = Probing(plan(tmp_path), most=100)
    for number in range(5000):
        probing.see(f"tenant-{number}", 0, Format.CHAT, [2.2])
    assert len(probing) == 100


def test_only_policies_that_ask_for_it_are_watched(tmp_path: Path) -> None:
    card = make_card(calibrations=[CALIBRATION])
    made = plan_of(tmp_path, policy_text(rule("p")), {"harm": unit_artifact(card)})
    assert Probing(made).bands(0, Format.CHAT) == ()
    assert not needs_sessions(made)
    assert needs_sessions(plan(tmp_path))
    # A format that nothing was calibrated for, and what no rule judges in a prompt.
    assert Probing(plan(tmp_path)).bands(0, Format.RAW) == ()
    stream = rule("s", stage="stream", when="aggregate: {kind: max}, above: {value: 2.3}")
    assert Probing(plan(tmp_path, rules=stream)).bands(0, Format.CHAT) == ()


def test_it_is_an_event_and_a_count_and_nothing_else(tmp_path: Path) -> None:
    trail = Trail(tmp_path, rules=rule("p", when="aggregate: {kind: max}, above: {value: 2.3}"))
    registry, made = CollectorRegistry(), plan(tmp_path, every=1000)
    sessions = open_sessions(lambda: made, SessionSettings(), registry, ledger=lambda: trail.ledger)

    async def probe() -> None:
        for number in range(40):
            sitting = await sessions.begin(Caller("acme"))
            assert sitting is not None
            assert sitting.imposed == ()
            sitting.take(Reading(f"r{number}", made, 0, Format.CHAT, [2.2]))
            await sitting.settled()

    asyncio.run(probe())
    events = trail.events()
    count = registry.get_sample_value("telltale_probing_total", {"detector": "harm", "policy": "default"})
    assert count == len(events) > 1
    event, content = events[0]
    assert isinstance(event, ProbingSuspected)
    assert (event.detector, event.near) == ("harm", event.requests)
    assert content is not None
    assert content.tenant == "acme"
