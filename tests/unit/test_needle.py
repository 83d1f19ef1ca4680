"""A short span in a long text: which aggregates still find it, and what length does to false alarms."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from probes.aggregate import Aggregator
from probes.aggregate.after import After
from probes.aggregate.base import Scores
from probes.aggregate.cusum import Cusum
from probes.aggregate.ema import Ema
from probes.aggregate.m_of_n import MOfN
from probes.aggregate.max import Max
from probes.aggregate.mean import Mean
from probes.aggregate.rolling import Rolling
from probes.aggregate.topk import TopK

LENGTHS = (32, 256, 4096)
TEXTS = 300
SPAN, SHIFT = 16, 2.5
FIND = [
    Rolling(window=16),
    MOfN(count=10, window=16),
    Cusum(drift=1.25),
    After(tokens=13, of=Ema(alpha=0.12)),
]


@cache
def texts(length: int, with_span: bool) -> Scores:
    """(length, TEXTS, 1) standard normal scores, in half of the cases with a span of SPAN that is SHIFT higher."""
    generator = np.random.default_rng((length, with_span))
    scores = generator.standard_normal((length, TEXTS, 1))
    if with_span:
        for text, start in enumerate(generator.integers(0, length - SPAN + 1, TEXTS)):
            scores[start : start + SPAN, text] += SHIFT
    return scores


def statistics(aggregator: Aggregator, length: int, *, with_span: bool) -> np.ndarray:
    """(TEXTS,) of a stream rule: the largest value on the way."""
    scores = texts(length, with_span)
    running = aggregator.update(aggregator.new_state(TEXTS, 1), scores)
    return running.max(axis=0)[:, 0] if not isinstance(aggregator, Mean) else running[-1, :, 0]


def found_at_one_percent(aggregator: Aggregator, length: int) -> float:
    """Share of the texts with a span that lie above 99 % of those without."""
    threshold = np.quantile(statistics(aggregator, length, with_span=False), 0.99)
    return float(np.mean(statistics(aggregator, length, with_span=True) > threshold))


@pytest.mark.parametrize("aggregator", FIND, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_span_is_found_at_any_length(aggregator: Aggregator, length: int) -> None:
    assert found_at_one_percent(aggregator, length) >= 0.95


@pytest.mark.parametrize("length", LENGTHS)
def test_an_exponential_mean_is_loose_at_its_beginning(length: int) -> None:
    """It starts at the first score alone: over a stream it finds the span only once those are left out."""
    assert found_at_one_percent(Ema(alpha=0.12), length) <= 0.5


def test_a_mean_over_all_dilutes_it() -> None:
    assert found_at_one_percent(Mean(), 32) >= 0.95
    assert found_at_one_percent(Mean(), 4096) <= 0.3


@pytest.mark.parametrize("aggregator", [Max(), TopK(k=8)], ids=str)
def test_what_grows_with_length_raises_false_alarms_where_it_was_calibrated_on_short_texts(
    aggregator: Aggregator,
) -> None:
    threshold = np.quantile(statistics(aggregator, 32, with_span=False), 0.99)
    alarms = [float(np.mean(statistics(aggregator, length, with_span=False) > threshold)) for length in LENGTHS]
    assert alarms == sorted(alarms)
    assert alarms[0] <= 0.02
    assert alarms[-1] >= 0.5


def test_a_mean_does_not() -> None:
    threshold = np.quantile(statistics(Mean(), 32, with_span=False), 0.99)
    for length in LENGTHS:
        assert np.mean(statistics(Mean(), length, with_span=False) > threshold) <= 0.02
