"""Sessions: accumulators over requests, what stands against a session, and stores that never let go of a block."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from monitor.accumulate import Accumulator, accumulator_kinds, parse_accumulator
from monitor.rollout import Subject
from monitor.session import Conversation, Session, advance
from monitor.sessions.memory import MemoryStore
from monitor.sessions.settings import SessionSettings
from monitor.sessions.store import SessionKey
from probes.aggregate.cusum import Cusum as CusumOfScores
from probes.card import Format

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cusum": [{"drift": 0.5}],
    "decay": [
        {"half_life": {"requests": 3}},
        {"half_life": {"time": "10s"}, "baseline": 1.0},
        {"half_life": {"requests": 0.5}, "join": "maximum"},
        {"half_life": {"time": "500ms"}, "join": "maximum", "baseline": -2.0},
    ],
    "m_of_n": [{"count": 1, "window": 1}, {"count": 2, "window": 5}],
    "path_length": [{}],
}
ALL = [parse_accumulator({"kind": kind, **fields}) for kind, each in VARIANTS.items() for fields in each]
statistics = st.floats(-20, 20, width=32)
gaps = st.integers(0, 3840).map(lambda ticks: ticks / 64)  # exact beside Unix times
requests = st.lists(st.tuples(statistics, gaps), min_size=1, max_size=12)


def values(accumulator: Accumulator, sequence: list[tuple[float, float]]) -> list[float]:
    """The value after each of (statistic, seconds since the one before)."""
    state, now, found = accumulator.start(), 1e9, []
    for statistic, gap in sequence:
        now += gap
        state, value = accumulator.step(state, statistic, now)
        found.append(value)
    return found


def naive(accumulator: Any, sequence: list[tuple[float, float]]) -> float:
    """The value after all of them, as the definition says it, from the whole sequence at once."""
    numbers = np.array([statistic for statistic, _ in sequence])
    times = np.cumsum([gap for _, gap in sequence])
    match accumulator.kind:
        case "cusum":
            return float(max(0.0, *(np.sum(numbers[start:] - accumulator.drift) for start in range(len(numbers)))))
        case "m_of_n":
            newest = sorted(numbers[-accumulator.window :], reverse=True)
            return newest[accumulator.count - 1] if len(newest) >= accumulator.count else -math.inf
        case "path_length":
            return float(sum(abs(after - before) for before, after in pairwise(numbers)))
        case _:
            life = accumulator.half_life
            if life.requests is not None:
                halves = (len(numbers) - 1 - np.arange(len(numbers))) / life.requests
            else:
                halves = (times[-1] - times) / {"10s": 10.0, "500ms": 0.5}[life.time]
            left = np.maximum(0, numbers - accumulator.baseline) * 2.0**-halves
            return float(left.sum() if accumulator.join == "sum" else left.max())


def test_every_kind_is_tested() -> None:
    assert set(VARIANTS) == set(accumulator_kinds())


@pytest.mark.parametrize("accumulator", ALL, ids=str)
@given(sequence=requests)
def test_request_by_request_is_the_whole_at_once(accumulator: Accumulator, sequence: list[tuple[float, float]]) -> None:
    assert values(accumulator, sequence)[-1] == pytest.approx(naive(accumulator, sequence), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("accumulator", ALL, ids=str)
@given(sequence=requests, cut=st.integers(0, 12))
def test_a_state_that_was_stored_goes_on_as_if_it_had_not(
    accumulator: Accumulator, sequence: list[tuple[float, float]], cut: int
) -> None:
    conversation = watching(accumulator)
    session, now, found = None, 1e9, []
    for number, (statistic, gap) in enumerate(sequence):
        now += gap
        session, _ = advance(session, [(conversation, statistic)], now)
        if number == cut:
            session = Session.from_json(session.to_json())
        found.append(session.states["k"])
    state, times = accumulator.start(), 1e9
    for (statistic, gap), stored in zip(sequence, found, strict=True):
        times += gap
        state, _ = accumulator.step(state, statistic, times)
        assert np.array_equal(np.array(state), np.array(stored), equal_nan=True)


@given(sequence=requests, threshold=st.floats(-5, 40))
def test_decay_forgets_and_harmless_talk_does_not_wash_it_out(
    sequence: list[tuple[float, float]], threshold: float
) -> None:
    """A request more of any kind leaves at least what time leaves; CUSUM of scores says the same as ours."""
    decay = parse_accumulator({"kind": "decay", "half_life": {"time": "10s"}})
    before = values(decay, sequence)[-1]
    after = values(decay, [*sequence, (-1e6, 10.0)])[-1]
    assert after == pytest.approx(before / 2)
    scores = np.array([statistic for statistic, _ in sequence]).reshape(-1, 1, 1)
    running = CusumOfScores(drift=0.5).update(np.zeros((1, 1, 1)), scores)
    ours = values(parse_accumulator({"kind": "cusum", "drift": 0.5}), sequence)
    assert (running.ravel() > threshold).tolist() == [value > threshold for value in ours]


def test_a_clock_that_goes_back_stands_still() -> None:
    decay = parse_accumulator({"kind": "decay", "half_life": {"time": "1s"}})
    state, _ = decay.step(decay.start(), 4.0, 100.0)
    state, value = decay.step(state, 0.0, 40.0)
    assert value == 4.0
    assert decay.step(state, 0.0, 101.0)[1] == 2.0


@pytest.mark.parametrize(
    "written",
    [
        {"kind": "decay", "half_life": {}},
        {"kind": "decay", "half_life": {"requests": 2, "time": "1m"}},
        {"kind": "decay", "half_life": {"requests": 0}},
        {"kind": "decay", "half_life": {"time": "0s"}},
        {"kind": "decay", "half_life": {"requests": 2}, "join": "mean"},
        {"kind": "m_of_n", "count": 3, "window": 2},
        {"kind": "cusum", "drift": math.nan},
        {"kind": "path_length", "length": 3},
    ],
)
def test_parameters_without_a_meaning_are_refused(written: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        parse_accumulator(written)


def watching(
    accumulator: Accumulator, *, threshold: float = math.inf, lasts: float = math.inf, holds: bool = True
) -> Conversation:
    return Conversation("k", 0, accumulator, threshold, Subject.SESSION, lasts, holds, frozenset(Format))


HIGH = watching(parse_accumulator({"kind": "m_of_n", "count": 1, "window": 1}), threshold=1.0, lasts=60.0)


def test_what_fires_stands_for_its_time_and_fires_once_in_it() -> None:
    session, fired = advance(None, [(HIGH, 2.0)], 1000.0)
    assert [(found.requests, found.value, found.until) for found in fired] == [(1, 2.0, 1060.0)]
    session, again = advance(session, [(HIGH, 9.0)], 1059.0)
    assert not again
    assert session.stands["k"] == 1060.0
    assert session.stand("k", 1059.9)
    assert not session.stand("k", 1060.0)
    _, later = advance(session, [(HIGH, 1.5)], 1060.0)
    assert [(found.requests, found.until) for found in later] == [(3, 1120.0)]


@pytest.mark.parametrize("statistic", [1.0, -math.inf, math.nan])
def test_only_what_lies_above_fires(statistic: float) -> None:
    session, fired = advance(None, [(HIGH, statistic)], 5.0)
    assert not fired
    assert session.requests == 1
    assert ("k" in session.states) == math.isfinite(statistic)


def test_two_tenants_with_the_same_session_are_apart() -> None:
    keys = [
        SessionKey.of(tenant, session)
        for tenant, session in (("a", "s"), ("b", "s"), ("a", "t"), ("a", None), ("", "s"))
    ]
    keys += [key.overflow for key in keys[:2]]
    assert len(set(keys)) == 7
    store = MemoryStore(SessionSettings())
    for number, key in enumerate(keys):
        store.update(key, lambda before: advance(before, [(HIGH, 0.0)], 1.0)[0], float(number))
    assert {key.session: store.read(key, 9.0).requests for key in keys} == dict.fromkeys([k.session for k in keys], 1)  # type: ignore[union-attr]


IDLE = 100.0
BLOCK_SECONDS = (30.0, 500.0, math.inf)


class Flood:
    """Tenants open sessions as they like; who is blocked is kept beside the store."""

    def __init__(self) -> None:
        self.settings = SessionSettings(per_tenant=4, total=9, idle="100s")
        self.store = MemoryStore(self.settings)
        self.now = 1000.0
        self.blocked: dict[SessionKey, float] = {}

    def request(self, tenant: str, session: int, lasts: float | None) -> None:
        key = SessionKey.of(tenant, str(session))
        conversation = watching(HIGH.accumulator, threshold=1.0, lasts=lasts or 0.0)
        statistic = 0.0 if lasts is None else 2.0
        after = self.store.update(key, lambda old: advance(old, [(conversation, statistic)], self.now)[0], self.now)
        assert after.stand("k", self.now) or lasts is None
        if after.stand("k", self.now):
            until = after.stands["k"]
            self.blocked[key] = until if math.isfinite(until) else self.now + IDLE

    def check(self) -> None:
        self.blocked = {key: until for key, until in self.blocked.items() if until > self.now}
        for key in self.blocked:
            session = self.store.read(key, self.now)
            assert session is not None
            assert session.stand("k", self.now)
        rooms = [len(room) for room in self.store._rooms.values()]
        assert len(self.store) == sum(rooms) <= self.settings.total
        assert max(rooms, default=0) <= self.settings.per_tenant


came = st.tuples(
    st.sampled_from("abc"), st.integers(0, 9), st.sampled_from([None, None, *BLOCK_SECONDS]), st.integers(0, 80)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(came, max_size=60))
def test_whoever_is_blocked_stays_so_whatever_else_is_opened(
    sequence: list[tuple[str, int, float | None, int]],
) -> None:
    flood = Flood()
    for tenant, session, lasts, wait in sequence:
        flood.now += wait / 8
        flood.check()
        flood.request(tenant, session, lasts)
        flood.check()
    flood.now += 1000.0
    flood.store.update(SessionKey.of("d", "last"), lambda _: Session(flood.now), flood.now)
    assert len(flood.store) == 1


def test_a_flood_pushes_out_its_own_sessions_only() -> None:
    counted: list[int] = []
    store = MemoryStore(SessionSettings(per_tenant=50, total=60), counted.append)

    def see(tenant: str, session: str, statistic: float, now: float) -> None:
        store.update(SessionKey.of(tenant, session), lambda old: advance(old, [(HIGH, statistic)], now)[0], now)

    for number in range(10):
        see("quiet", str(number), 0.0, float(number))
    for number in range(1000):
        see("loud", str(number), 0.0, 10.0 + number / 1000)
    assert all(store.read(SessionKey.of("quiet", str(number)), 12.0) for number in range(10))
    assert len(store) == 60
    assert sum(counted) == 950


def test_where_all_are_blocked_new_sessions_share_one_and_nobody_goes_unwatched() -> None:
    store = MemoryStore(SessionSettings(per_tenant=3))
    for number in range(3):
        store.update(SessionKey.of("t", str(number)), lambda old: advance(old, [(HIGH, 5.0)], 1.0)[0], 1.0)
    fresh = SessionKey.of("t", "fresh")
    store.update(fresh, lambda old: advance(old, [(HIGH, 0.0)], 2.0)[0], 2.0)
    other = store.update(SessionKey.of("t", "other"), lambda old: advance(old, [(HIGH, 5.0)], 3.0)[0], 3.0)
    assert other.requests == 2
    held = store.read(fresh, 4.0)
    assert held is not None
    assert held.stand("k", 4.0)
    # There is room again while the shared one still stands: whoever was part of it goes on with it.
    later = store.update(fresh, lambda old: advance(old, [(HIGH, 0.0)], 62.0)[0], 62.0)
    assert later.stand("k", 62.0)


def test_a_stored_text_that_is_no_session_is_said_to_be_none() -> None:
    for text in ("", "{}", "[1]", '[1,2,{"k":3},{},0]', "null"):
        with pytest.raises(ValueError):
            Session.from_json(text)


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"url": "postgresql://h/d"}, "stand together"),
        ({"on_failure": "block"}, "stand together"),
        ({"url": "redis://h", "on_failure": "block"}, "must begin with postgresql://"),
        ({"idle": "0s"}, "between 1s and 240h"),
        ({"idle": "241h"}, "between 1s and 240h"),
    ],
)
def test_settings_without_a_meaning_are_refused(given_: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SessionSettings.model_validate_json(json.dumps(given_))
