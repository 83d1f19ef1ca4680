"""Canaries: a wrong score is found wherever it is, times are kept without a clock, and the watch forgets nothing."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from monitor.canary import CanaryFailure, CanaryPrompt, CanaryWatch, Expected, Failed, canary_prompts
from monitor.config import CanarySettings
from monitor.duration import seconds_of
from probes.card import Canary, Card
from tests.unit.artifacts import make_card

TOKENS = tuple(range(10, 22))
SKIP = 2
EVERY, DEADLINE = 60.0, 10.0


def expected(column: int = 0, tolerance: float = 0.1) -> Expected:
    scores = np.linspace(-1, 1, len(TOKENS) - SKIP)[:, None] * (column + 1)
    return Expected(f"d{column}", column, SKIP, scores, tolerance)


def right(*, detectors: int = 2) -> tuple[CanaryPrompt, np.ndarray, np.ndarray]:
    entries = tuple(expected(column) for column in range(detectors))
    scores = np.full((len(TOKENS), detectors), 1e4)  # the sink may hold anything finite
    for entry in entries:
        scores[SKIP:, entry.column] = entry.scores[:, 0]
    return CanaryPrompt(TOKENS, entries), scores, np.ones(len(TOKENS), dtype=bool)


@pytest.mark.covers("canary: corrupted weights", "noticed")
@given(
    position=st.integers(SKIP, len(TOKENS) - 1),
    column=st.integers(0, 1),
    excess=st.floats(1.01, 1e6) | st.floats(-1e6, -1.01),
)
def test_one_wrong_score_anywhere_is_named(position: int, column: int, excess: float) -> None:
    prompt, scores, seen = right()
    scores[position, column] += excess * 0.1
    failed = prompt.compare(scores, seen)
    assert failed is not None
    assert failed.reason is CanaryFailure.WRONG_SCORES
    assert f"'d{column}' at position {position}:" in failed.detail


@given(noise=st.lists(st.floats(-0.99, 0.99), min_size=len(TOKENS) - SKIP, max_size=len(TOKENS) - SKIP))
def test_what_lies_within_the_tolerance_passes(noise: list[float]) -> None:
    prompt, scores, seen = right()
    scores[SKIP:, 0] += 0.1 * np.array(noise)
    assert prompt.compare(scores, seen) is None


def test_sinks_are_not_compared_but_must_be_finite_and_seen() -> None:
    prompt, scores, seen = right()
    scores[0] = -1e6
    assert prompt.compare(scores, seen) is None
    scores[0, 1] = np.nan
    failed = prompt.compare(scores, seen)
    assert failed is not None
    assert failed.reason is CanaryFailure.NOT_FINITE
    seen[0] = False
    failed = prompt.compare(scores, seen)
    assert failed is not None
    assert failed.reason is CanaryFailure.NOT_SEEN


def with_canary(name: str, tokens: tuple[int, ...]) -> Card:
    canary = Canary(tokens=tokens, scores=(0.0,) * (len(tokens) - 1), tolerance=0.1, reference="by hand")
    return make_card(name).model_copy(update={"canary": canary})


def test_one_prompt_serves_all_detectors_that_share_it() -> None:
    cards = {"a": with_canary("a", TOKENS), "b": make_card("b"), "c": with_canary("c", TOKENS)}
    cards["d"] = with_canary("d", TOKENS[:8])
    shared, own = canary_prompts(cards, {"a": 0, "b": 1, "c": 2, "d": 3}, vocab=100)
    assert [(entry.detector, entry.column) for entry in shared.expected] == [("a", 0), ("c", 2)]
    assert [(entry.detector, entry.column) for entry in own.expected] == [("d", 3)]
    assert own.tokens == TOKENS[:8]


def test_without_any_canary_a_plain_prompt_of_the_models_tokens_is_sent() -> None:
    (prompt,) = canary_prompts({"b": make_card("b")}, {"b": 0}, vocab=5)
    assert prompt.expected == ()
    assert all(0 <= token < 5 for token in prompt.tokens)


def test_a_card_with_a_score_too_few_is_refused() -> None:
    card = with_canary("a", TOKENS).model_dump()
    card["canary"]["scores"] = card["canary"]["scores"][:-1]
    with pytest.raises(ValueError, match="10 scores for 12 tokens, of which the first 1"):
        Card.model_validate(card)


def watch(*prompts: CanaryPrompt) -> CanaryWatch:
    return CanaryWatch(prompts or (CanaryPrompt(TOKENS),), every=EVERY, deadline=DEADLINE)


WRONG = Failed(CanaryFailure.WRONG_SCORES, "wrong")


def run(seen: CanaryWatch, name: str, at: float, *, took: float = 1.0, verdict: Failed | None = None) -> Failed | None:
    seen.arrived(name, at)
    seen.began(name, at)
    return seen.done(name, TOKENS, verdict, at + took)


def test_nobody_watches_before_the_first_canary() -> None:
    seen = watch()
    assert seen.failing(1e9) is None
    assert not seen.passed


def test_a_failure_lasts_until_the_next_one_passes() -> None:
    seen = watch()
    run(seen, "a", 0)
    assert seen.passed
    run(seen, "b", 60, verdict=WRONG)
    assert seen.failing(61) == WRONG
    assert not seen.passed
    seen.arrived("c", 70)
    seen.began("c", 70)
    assert seen.failing(71) == WRONG
    seen.done("c", TOKENS, None, 71)
    assert seen.failing(72) is None


def test_every_prompt_must_pass() -> None:
    seen = watch(CanaryPrompt(TOKENS), CanaryPrompt(TOKENS[:8]))
    run(seen, "a", 0)
    assert not seen.passed
    seen.arrived("b", 1)
    seen.done("b", TOKENS[:8], WRONG, 2)
    run(seen, "c", 3)
    assert seen.failing(4) == WRONG


@pytest.mark.covers("canary: late", "noticed")
def test_a_canary_under_way_is_late_at_the_deadline_and_stays_late_when_it_ends() -> None:
    seen = watch()
    seen.arrived("a", 0)
    seen.began("a", 100)
    seen.began("a", 105)  # a second step does not wind the clock back
    assert seen.failing(100 + DEADLINE) is None
    late = seen.failing(100 + DEADLINE + 0.01)
    assert late is not None
    assert late.reason is CanaryFailure.LATE
    ended = seen.done("a", TOKENS, None, 111)
    assert ended is not None
    assert ended.reason is CanaryFailure.LATE
    run(seen, "b", 112)
    assert seen.failing(113) is None


def test_waiting_in_the_queue_is_no_failure() -> None:
    seen = watch()
    seen.arrived("a", 0)
    assert seen.waiting
    assert seen.failing(1e6) is None
    seen.withdrawn("a", 1e6)
    assert seen.failing(1e6) is None
    assert not seen.passed


def test_one_that_is_withdrawn_too_late_has_failed() -> None:
    seen = watch()
    seen.arrived("a", 0)
    seen.began("a", 0)
    seen.withdrawn("a", DEADLINE + 1)
    failed = seen.failing(DEADLINE + 1)
    assert failed is not None
    assert failed.reason is CanaryFailure.LATE


def test_none_for_longer_than_period_and_deadline_is_a_failure() -> None:
    seen = watch()
    run(seen, "a", 0)
    assert seen.failing(1 + EVERY + DEADLINE) is None
    failed = seen.failing(1 + EVERY + DEADLINE + 0.1)
    assert failed is not None
    assert failed.reason is CanaryFailure.MISSING
    run(seen, "b", 80)
    assert seen.failing(81) is None


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("60s", 60), ("5m", 300), ("24h", 86400)])
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": "0s"},
        {"every": "25h"},
        {"every": "off"},
        {"every": 60},
        {"every": "1.5s"},
        {"every": "60"},
        {"every": "60 s"},
        {"deadline": "99ms"},
        {"deadline": "11m"},
        {"evry": "60s"},
    ],
)
def test_canary_settings_out_of_bounds_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"every|deadline|evry"):
        CanarySettings.model_validate(wrong)
