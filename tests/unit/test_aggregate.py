"""Aggregates: streaming is batch, a request is alone in any batch, and each kind is what its definition says."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from monitor.when import When
from probes.aggregate import AggregateError, Aggregator, aggregator_kinds, parse_aggregator
from probes.aggregate.after import After
from probes.aggregate.attention import Attention
from probes.aggregate.base import Scores
from probes.aggregate.cusum import Cusum
from probes.aggregate.delta import Delta
from probes.aggregate.ema import Ema
from probes.aggregate.last import Last
from probes.aggregate.logsumexp import LogSumExp
from probes.aggregate.m_of_n import MOfN
from probes.aggregate.max import Max
from probes.aggregate.mean import Mean
from probes.aggregate.multimax import MultiMax
from probes.aggregate.rolling import Rolling
from probes.aggregate.topk import TopK
from tests.unit.naive import NAIVE, naive_values

TOLERANCE = 1e-9
VARIANTS: dict[type[Aggregator], list[Aggregator]] = {
    After: [After(tokens=2, of=Max()), After(tokens=5, of=Ema(alpha=0.3))],
    Attention: [Attention(heads=1), Attention(heads=3)],
    Cusum: [Cusum(), Cusum(drift=0.5), Cusum(drift=-2.0)],
    Delta: [Delta(of="last"), Delta(of="mean"), Delta(of="max")],
    Ema: [Ema(), Ema(alpha=1.0), Ema(alpha=0.9)],
    LogSumExp: [LogSumExp(), LogSumExp(temperature=0.05), LogSumExp(temperature=40.0)],
    MOfN: [MOfN(), MOfN(count=1, window=1), MOfN(count=1, window=4), MOfN(count=4, window=4), MOfN(count=2, window=3)],
    MultiMax: [MultiMax(heads=1), MultiMax(heads=4)],
    Rolling: [Rolling(), Rolling(window=1), Rolling(window=2), Rolling(window=5)],
    TopK: [TopK(), TopK(k=1), TopK(k=3)],
}
WIDE = {Attention, MultiMax}
"""Those whose plain definition takes a row of numbers."""
ALL = [variant for cls in aggregator_kinds().values() for variant in (VARIANTS.get(cls) or [cls()])]
each_kind = pytest.mark.parametrize("aggregator", ALL, ids=str)


def whole(aggregator: Aggregator, values: Scores) -> Scores:
    return aggregator.update(fresh(aggregator, values), values)


def widened(aggregator: Aggregator, values: Scores) -> Scores:
    """(T, R, B) as (T, R, B * channels): the further channels are the same numbers at other times, and larger."""
    channels = [np.roll(values, number, axis=0) * (1 + number) for number in range(aggregator.channels)]
    return np.stack(channels, axis=-1).reshape(*values.shape[:2], -1)


def fresh(aggregator: Aggregator, values: Scores) -> Scores:
    """State for widened scores."""
    return aggregator.new_state(values.shape[1], values.shape[2] // aggregator.channels)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Scores, list[int]]:
    """(T, R, B) scores of mixed magnitude, and where to cut them."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal(shape) * 10.0 ** draw(st.integers(-3, 3)) + draw(st.sampled_from([0.0, 50.0, -1e4]))
    cuts = draw(st.sets(st.integers(1, shape[0])))
    return values, sorted(cuts | {0, shape[0]})


def assert_equal(found: Scores, expected: Scores, values: Scores) -> None:
    assert found.shape == expected.shape
    assert np.array_equal(np.isneginf(found), np.isneginf(expected))
    scale = 1.0 + np.abs(values).max()
    finite = np.isfinite(expected)
    assert np.abs(found[finite] - expected[finite]).max(initial=0.0) <= TOLERANCE * scale


@pytest.mark.covers("chunked prefill", "statistics equal batch")
@each_kind
@settings(max_examples=40, deadline=None)
@given(case=sequences())
def test_any_chunking_is_the_batch(aggregator: Aggregator, case: tuple[Scores, list[int]]) -> None:
    values, cuts = widened(aggregator, case[0]), case[1]
    state = fresh(aggregator, values)
    parts = [aggregator.update(state, values[start:end]) for start, end in pairwise(cuts)]
    assert_equal(np.concatenate(parts), whole(aggregator, values), values)


@pytest.mark.covers("several requests at once", "isolation")
@each_kind
@settings(max_examples=25, deadline=None)
@given(case=sequences())
def test_a_request_in_a_batch_is_as_if_alone(aggregator: Aggregator, case: tuple[Scores, list[int]]) -> None:
    values, count = widened(aggregator, case[0]), aggregator.channels
    together = whole(aggregator, values)
    for request in range(values.shape[1]):
        for detector in range(values.shape[2] // count):
            own = slice(detector * count, (detector + 1) * count)
            alone = whole(aggregator, values[:, request : request + 1, own])
            assert_equal(alone[:, 0, 0], together[:, request, detector], values)


def test_each_kind_has_a_plain_definition() -> None:
    assert set(NAIVE) == set(aggregator_kinds().values())


@pytest.mark.parametrize("aggregator", [variant for variant in ALL if type(variant) in NAIVE], ids=str)
@settings(max_examples=25, deadline=None)
@given(scores=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_equals_its_definition(aggregator: Aggregator, scores: list[float]) -> None:
    values = widened(aggregator, np.array(scores)[:, None, None])
    rows = values[:, 0].tolist() if type(aggregator) in WIDE else scores
    assert_equal(whole(aggregator, values)[:, 0, 0], np.array(naive_values(aggregator, rows)), values)


@each_kind
def test_conforms(aggregator: Aggregator) -> None:
    """What the monitor relies on, for every kind that discovery finds."""
    rng = np.random.default_rng(0)
    values = widened(aggregator, rng.standard_normal((7, 4, 3)))
    untouched = values.copy()
    state = aggregator.new_state(4, 3)
    assert state.shape == (4, aggregator.state_size, 3)
    assert state.dtype == np.float64
    running = aggregator.update(state, values)
    assert running.shape == (7, 4, 3)
    assert running.dtype == np.float64
    assert not np.isnan(running).any()
    assert not np.isposinf(running).any()
    assert np.array_equal(values, untouched)
    # A chunk that is fed must not change what was returned before.
    before = running.copy()
    aggregator.update(state, values)
    assert np.array_equal(running, before)
    # One slot can be reset by hand, as the state table does.
    state[1] = aggregator.initial
    again = aggregator.update(state[1:2], values[:, 1:2])
    assert_equal(again, running[:, 1:2], values)


@each_kind
def test_survives_a_policy_file(aggregator: Aggregator) -> None:
    assert parse_aggregator(aggregator.config()) == aggregator
    assert hash(parse_aggregator(aggregator.config())) == hash(aggregator)
    assert str(aggregator).startswith(aggregator.kind)


def test_every_shipped_kind_has_a_definition_here() -> None:
    assert {Last, Mean, Max, Ema, Rolling} <= set(aggregator_kinds().values())
    assert set(NAIVE) == set(aggregator_kinds().values())


def test_the_schema_has_every_kind_with_every_parameter() -> None:
    schema: dict[str, Any] = When.model_json_schema()["properties"]["aggregate"]
    variants = next(entry["oneOf"] for entry in schema["anyOf"] if "oneOf" in entry)
    by_kind = {variant["properties"]["kind"]["const"]: variant for variant in variants}
    assert set(by_kind) == set(aggregator_kinds())
    for kind, cls in aggregator_kinds().items():
        variant = by_kind[kind]
        assert set(variant["properties"]) == {"kind", *cls.model_fields}
        assert "kind" in variant["required"]
        assert variant["additionalProperties"] is False
        for name in cls.model_fields:
            assert variant["properties"][name].get("description"), f"{kind}.{name} has no description"


def test_ema_starts_at_the_first_score() -> None:
    assert whole(Ema(alpha=0.12), np.full((1, 1, 1), 7.0))[0, 0, 0] == pytest.approx(7.0, abs=1e-12)


def test_rolling_is_undefined_until_full() -> None:
    running = whole(Rolling(window=3), np.array([1e6, 1e6, 1.0, 2.0])[:, None, None])[:, 0, 0]
    assert running[:2].tolist() == [-math.inf, -math.inf]
    assert running[3] == pytest.approx((1e6 + 3.0) / 3)


def test_m_of_n_is_above_exactly_when_m_of_the_newest_n_are() -> None:
    values = np.random.default_rng(3).standard_normal((200, 1, 1))
    running = whole(MOfN(count=3, window=7), values)
    for end in range(1, len(values) + 1):
        above = np.count_nonzero(values[max(0, end - 7) : end] > 0.4)
        assert (running[end - 1, 0, 0] > 0.4) == (above >= 3)


def test_rolling_forgets_exactly() -> None:
    """A huge score leaves nothing behind once it is out of the window."""
    running = whole(Rolling(window=2), np.array([1e15, 1.0, 1.0, 1.0])[:, None, None])[:, 0, 0]
    assert running[-2:].tolist() == [1.0, 1.0]


def test_topk_lies_between_the_mean_and_the_maximum() -> None:
    values = np.random.default_rng(4).standard_normal((60, 2, 3))
    np.testing.assert_allclose(whole(TopK(k=1), values), whole(Max(), values), atol=1e-12)
    np.testing.assert_allclose(whole(TopK(k=60), values), whole(Mean(), values), atol=1e-12)


def test_logsumexp_goes_from_the_maximum_to_the_mean() -> None:
    values = np.random.default_rng(5).standard_normal((60, 2, 3))
    np.testing.assert_allclose(whole(LogSumExp(temperature=1e-4), values), whole(Max(), values), atol=1e-3)
    np.testing.assert_allclose(whole(LogSumExp(temperature=1e3), values), whole(Mean(), values), atol=1e-3)
    # Said twice, a text has the same value.
    twice = np.concatenate([values, values])
    np.testing.assert_allclose(whole(LogSumExp(), twice)[-1], whole(LogSumExp(), values)[-1], atol=1e-12)


def test_cusum_loses_no_digits_on_a_long_way_down() -> None:
    values = np.full((4096, 1, 1), -1e6)
    values[-1] = 0.25
    assert whole(Cusum(), values)[-1, 0, 0] == 0.25


@pytest.mark.parametrize("value", [{"kind": "attention", "heads": 2}, {"kind": "delta"}])
def test_what_waits_is_an_aggregate_for_any_detector(value: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="goes with one kind of detector alone"):
        parse_aggregator({"kind": "after", "tokens": 3, "of": value})


@pytest.mark.parametrize("value", ["max", 3, None, {}, {"kind": 3}, {"window": 3}])
def test_an_aggregate_without_a_kind_is_refused(value: object) -> None:
    with pytest.raises(AggregateError, match=r"written \{kind: NAME"):
        parse_aggregator(value)


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(AggregateError, match="Did you mean 'rolling'"):
        parse_aggregator({"kind": "roling"})


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "rolling", "window": 0},
        {"kind": "rolling", "window": "4"},
        {"kind": "rolling", "windw": 4},
        {"kind": "ema", "alpha": 0.0},
        {"kind": "ema", "alpha": float("nan")},
        {"kind": "max", "window": 3},
        {"kind": "m_of_n", "count": 4, "window": 3},
        {"kind": "topk", "k": 0},
        {"kind": "logsumexp", "temperature": 0.0},
        {"kind": "cusum", "drift": float("inf")},
    ],
)
def test_a_parameter_out_of_bounds_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        parse_aggregator(value)
