"""Aggregates written a second time, as plainly as their definitions: one sequence, one number a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from monitor.check import Check
from monitor.types import Role
from probes.aggregate import Aggregator
from probes.aggregate.after import After
from probes.aggregate.attention import Attention
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
from probes.card import Stage

UNDEFINED = float("-inf")


def naive_ema(aggregator: Aggregator, scores: Sequence[float]) -> float:
    assert isinstance(aggregator, Ema)
    value = scores[0]
    for score in scores[1:]:
        value = aggregator.alpha * score + (1 - aggregator.alpha) * value
    return value


def naive_rolling(aggregator: Aggregator, scores: Sequence[float]) -> float:
    assert isinstance(aggregator, Rolling)
    newest = scores[-aggregator.window :]
    return sum(newest) / aggregator.window if len(newest) == aggregator.window else UNDEFINED


def naive_m_of_n(aggregator: Aggregator, scores: Sequence[float]) -> float:
    assert isinstance(aggregator, MOfN)
    newest = sorted(scores[-aggregator.window :], reverse=True)
    return newest[aggregator.count - 1] if len(newest) >= aggregator.count else UNDEFINED


def naive_topk(aggregator: Aggregator, scores: Sequence[float]) -> float:
    assert isinstance(aggregator, TopK)
    largest = sorted(scores, reverse=True)[: aggregator.k]
    return math.fsum(largest) / len(largest)


def naive_logsumexp(aggregator: Aggregator, scores: Sequence[float]) -> float:
    assert isinstance(aggregator, LogSumExp)
    temperature, top = aggregator.temperature, max(scores)
    return top + temperature * math.log(math.fsum(math.exp((s - top) / temperature) for s in scores) / len(scores))


def naive_cusum(aggregator: Aggregator, scores: Sequence[float]) -> float:
    assert isinstance(aggregator, Cusum)
    value = 0.0
    for score in scores:
        value = max(0.0, value + score - aggregator.drift)
    return value


def naive_attention(aggregator: Aggregator, rows: Sequence[Sequence[float]]) -> float:
    assert isinstance(aggregator, Attention)
    statistic = 0.0
    for head in range(aggregator.heads):
        top = max(row[head] for row in rows)
        weights = [math.exp(row[head] - top) for row in rows]
        values = [row[aggregator.heads + head] for row in rows]
        statistic += math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)
    return statistic


def naive_multimax(aggregator: Aggregator, rows: Sequence[Sequence[float]]) -> float:
    assert isinstance(aggregator, MultiMax)
    return math.fsum(max(row[head] for row in rows) for head in range(aggregator.heads))


def naive_delta(aggregator: Aggregator, scores: Sequence[float]) -> float:
    assert isinstance(aggregator, Delta)
    moved = [score - scores[0] for score in scores[1:]]
    if not moved:
        return UNDEFINED
    return {"last": moved[-1], "mean": math.fsum(moved) / len(moved), "max": max(moved)}[aggregator.of]


def naive_after(aggregator: Aggregator, scores: Sequence[Any]) -> float:
    assert isinstance(aggregator, After)
    return NAIVE[type(aggregator.of)](aggregator.of, scores) if len(scores) >= aggregator.tokens else UNDEFINED


NAIVE: dict[type[Aggregator], Callable[[Aggregator, Sequence[Any]], float]] = {
    After: naive_after,
    Attention: naive_attention,
    Delta: naive_delta,
    MultiMax: naive_multimax,
    Last: lambda _, scores: scores[-1],
    Mean: lambda _, scores: sum(scores) / len(scores),
    Max: lambda _, scores: max(scores),
    Cusum: naive_cusum,
    Ema: naive_ema,
    LogSumExp: naive_logsumexp,
    MOfN: naive_m_of_n,
    Rolling: naive_rolling,
    TopK: naive_topk,
}


def naive_values(aggregator: Aggregator, scores: Sequence[Any]) -> list[float]:
    """The statistic after each score; of an aggregate with channels, after each row of them."""
    value = NAIVE[type(aggregator)]
    return [value(aggregator, scores[:end]) for end in range(1, len(scores) + 1)]


def naive_reads(
    check: Check, position: int, roles: Sequence[Role] | None, *, num_prompt: int, stream_from: int
) -> bool:
    """Whether a check reads a position; ``roles`` of the prompt, None if nobody knows them."""

    def read(place: int) -> bool:
        return _in_its_segment(check, place, roles, num_prompt=num_prompt, stream_from=stream_from)

    before = check.aggregate.reads_before and position >= check.skip_first and read(position + 1)
    return read(position) or (before and not any(read(place) for place in range(position)))


def _in_its_segment(
    check: Check, position: int, roles: Sequence[Role] | None, *, num_prompt: int, stream_from: int
) -> bool:
    if position < check.skip_first:
        return False
    if check.stage is not Stage.PROMPT:
        return position >= stream_from
    if position >= num_prompt:
        return False
    return check.segments is None or roles is None or roles[position] in check.segments
