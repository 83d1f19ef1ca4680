"""Theorems of the monitor, over random requests, chunkings, interleavings and preemptions of a scripted engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from monitor.check import Check
from monitor.monitor import Ended, Monitor
from monitor.policy import Plan
from monitor.segments import PromptMap, runs_of
from monitor.types import ActionCode, Gap, Role, Skip
from probes.card import Format, Stage
from tests.unit.artifacts import make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.naive import UNDEFINED, naive_reads, naive_values
from tests.unit.script import Part, Script

Float64 = npt.NDArray[np.float64]
RULES = [
    rule("prompt-max", when="aggregate: {kind: max}, above: {value: 2.2}"),
    rule("prompt-last", when="aggregate: {kind: last}, above: {value: 0.5}", action="flag"),
    rule("prompt-mean", detector="other", when="aggregate: {kind: mean}, above: {value: 0.3}", mode="shadow"),
    rule("stream-ema", stage="stream", when="aggregate: {kind: ema, alpha: 0.3}, above: {value: 0.9}"),
    rule("stream-max", stage="stream", when="aggregate: {kind: max}, above: {value: 1.0}", action="flag"),
    rule("roll", detector="other", stage="stream", when="aggregate: {kind: rolling, window: 4}, above: {value: 0.4}"),
    rule("stream-mean", detector="other", stage="stream", when="aggregate: {kind: mean}, above: {value: 0.2}"),
    rule("end-last", stage="response", when="aggregate: {kind: last}, above: {value: 0.4}", action="flag"),
    rule("end-mean", detector="other", stage="response", when="aggregate: {kind: mean}, above: {value: 0.1}",
         action="flag", mode="shadow"),
    rule("tool-max", when="segments: [tool], aggregate: {kind: max}, above: {value: 1.2}", action="flag"),
    rule("said-ema", when="segments: [user, assistant], aggregate: {kind: ema, alpha: 0.4}, above: {value: 0.6}"),
    rule("moved", when="segments: [tool], aggregate: {kind: delta}, above: {value: 0.5}", action="flag"),
    rule("moves", stage="stream", when="aggregate: {kind: delta, of: mean}, above: {value: 0.8}", action="flag"),
    rule("said", detector="other", when="segments: [user], aggregate: {kind: rolling, window: 3}, above: {value: 1}"),
]  # fmt: skip
SKIP = 2
"""The larger skip_first of the two detectors: what the account calls the sink."""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    artifacts = {
        "harm": unit_artifact(make_card(skip_first=1)),
        "other": unit_artifact(make_card("other", layers=(2,), skip_first=SKIP)),
    }
    text = policy_text("\n".join(RULES), names=["harm", "other"], policy="hold_back: 1")
    return plan_of(tmp_path_factory.mktemp("plan"), text, artifacts)


@dataclass
class Reply:
    """A request as the engine will run it: scores of every computed position, (positions, detectors) float32."""

    name: str
    num_prompt: int
    scores: npt.NDArray[np.float32]
    roles: list[Role] | None
    stream_from: int
    cursor: int = 0

    @property
    def prompt(self) -> PromptMap:
        """What its front end says."""
        if self.roles is None:
            return PromptMap(None, self.stream_from)
        codes = np.array([role.code for role in self.roles], dtype=np.uint8)
        return PromptMap(runs_of(codes), self.stream_from)

    @property
    def num_positions(self) -> int:
        """With the last sampled token, which is never computed."""
        return len(self.scores) + 1


@st.composite
def replies(draw: st.DrawFn, largest: int = 6) -> list[Reply]:
    shapes = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 14)), min_size=1, max_size=largest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [
        Reply(
            f"r{number}",
            prompt,
            rng.standard_normal((prompt + generated, 2)).astype(np.float32),
            [Role(role) for role in rng.choice(list(Role), size=prompt)] if rng.random() < 0.9 else None,
            int(rng.integers(prompt + 1)) if rng.random() < 0.5 else prompt,
        )
        for number, (prompt, generated) in enumerate(shapes)
    ]


def serve(plan: Plan, requests: list[Reply], rng: np.random.Generator, *, rough: bool = True) -> dict[str, Ended]:
    """Run all requests to their end; ``rough``: in random chunks and company, with preemptions and strangers."""
    monitor, script = Monitor(plan), Script(plan)
    for request in requests:
        monitor.admit(request.name, num_prompt=request.num_prompt, policy=None, fmt=Format.CHAT, prompt=request.prompt)
        # Some find a prefix in the cache; at least the last prompt token is always computed.
        request.cursor = int(rng.integers(request.num_prompt)) if rough and rng.random() < 0.3 else 0
        monitor.replay(request.name, script.rows(request.scores[: request.cursor]))
    actions = dict.fromkeys((request.name for request in requests), ActionCode.ALLOW)
    ended: dict[str, Ended] = {}
    while len(ended) < len(requests):
        parts: list[Part] = []
        for request in rng.permutation(np.array(requests, dtype=object)):
            left = len(request.scores) - request.cursor
            if request.name in ended or (rough and rng.random() < 0.3):
                continue
            if rough and rng.random() < 0.1:
                request.cursor, left = 0, len(request.scores)  # preempted: it starts again
            in_prompt = max(request.num_prompt - request.cursor, 1)
            count = min(left, int(rng.integers(1, in_prompt + 1)) if rough else in_prompt)
            span = range(request.cursor, request.cursor + count)
            parts.append((request.name, span, script.rows(request.scores[span.start : span.stop])))
            request.cursor += count
        if rough and rng.random() < 0.3:
            parts.insert(int(rng.integers(len(parts) + 1)), ("stranger", range(2), script.rows(np.full((2, 2), 99.0))))
        monitor.observe(script.step(parts))
        for request in requests:
            live = monitor.get(request.name)
            if live is not None:
                assert live.action >= actions[request.name]
                actions[request.name] = live.action
            if request.name not in ended and request.cursor == len(request.scores):
                sampled = request.num_positions - request.num_prompt
                done = monitor.finish(request.name, num_positions=request.num_positions, sampled=sampled, aborted=False)
                assert done is not None
                ended[request.name] = done
    tally = monitor.take_tally()
    assert tally.scored == sum(item.coverage.scored for item in ended.values())
    assert tally.skipped[Skip.SINK] == sum(item.coverage.sink for item in ended.values())
    assert tally.skipped[Skip.FINAL] == len(ended)
    assert not any(tally.gaps.values())
    return ended


def reads(check: Check, request: Reply) -> npt.NDArray[np.bool_]:
    """The positions that a check reads."""
    known = {"num_prompt": request.num_prompt, "stream_from": request.stream_from}
    return np.array([naive_reads(check, at, request.roles, **known) for at in range(len(request.scores))], dtype=bool)


def offline(plan: Plan, request: Reply) -> Float64:
    """Every check's statistic from all scores at once, by the naive aggregates."""
    found = []
    for check in plan.checks:
        scores = request.scores[:, plan.bank.index[check.detector]].astype(float)
        values = naive_values(check.aggregate, scores[reads(check, request)].tolist())
        found.append((max(values) if check.stage is Stage.STREAM else values[-1]) if values else UNDEFINED)
    return np.array(found)


def close(found: Float64, expected: Float64) -> bool:
    return bool(np.allclose(found, expected, rtol=0, atol=1e-9))


@pytest.mark.covers(
    ["chunked prefill", "preemption", "warm prefix cache", "several requests at once"], "statistics equal batch"
)
@pytest.mark.covers(
    ["chunked prefill", "preemption", "warm prefix cache", "several requests at once"], "verdict the same"
)
@settings(max_examples=60, deadline=None)
@given(requests=replies(), seed=st.integers(0, 2**32 - 1))
def test_verdicts_are_the_offline_reference(plan: Plan, requests: list[Reply], seed: int) -> None:
    """Whatever the chunks, repetitions and company, each position counts once and gives the offline verdict."""
    ended = serve(plan, requests, np.random.default_rng(seed))
    limits = np.array([check.thresholds[Format.CHAT] for check in plan.checks])
    for request in requests:
        done, expected = ended[request.name], offline(plan, request)
        assert close(done.statistics, expected)
        clear = np.abs(expected - limits) > 1e-8
        assert np.array_equal(done.fired[clear], (expected > limits)[clear])
        acted = [entry for entry in plan.policies[0].rules if done.fired[entry.verdicts[0]]]
        assert done.request.decided == {entry.name for entry in acted}
        worst = max((entry.action.severity for entry in acted if entry.mode.value == "enforce"), default=0)
        assert done.request.action == worst


@pytest.mark.covers(
    ["chunked prefill", "preemption", "warm prefix cache", "several requests at once"], "every position accounted for"
)
@settings(max_examples=60, deadline=None)
@given(requests=replies(), seed=st.integers(0, 2**32 - 1))
def test_every_position_is_accounted_for(plan: Plan, requests: list[Reply], seed: int) -> None:
    ended = serve(plan, requests, np.random.default_rng(seed))
    for request in requests:
        coverage = ended[request.name].coverage
        assert coverage.positions == request.num_positions
        assert (coverage.sink, coverage.final) == (min(SKIP, len(request.scores)), 1)
        assert coverage.scored == len(request.scores) - coverage.sink
        assert coverage.skipped() == {"sink": coverage.sink, "final": 1}


@pytest.mark.covers("several requests at once", "isolation")
@settings(max_examples=40, deadline=None)
@given(requests=replies(), seed=st.integers(0, 2**32 - 1))
def test_company_changes_nothing(plan: Plan, requests: list[Reply], seed: int) -> None:
    """Step for step, a request has the same bits alone as beside others."""
    together = serve(plan, requests, np.random.default_rng(seed), rough=False)
    for request in requests:
        alone = serve(plan, [request], np.random.default_rng(0), rough=False)[request.name]
        assert np.array_equal(alone.statistics, together[request.name].statistics)
        assert np.array_equal(alone.fired, together[request.name].fired)
        assert alone.request.action is together[request.name].request.action


@pytest.mark.covers(
    ["position that never came", "NaN in a readout", "infinite readout", "step without readouts"],
    "gap counted, on_gap followed",
)
@settings(max_examples=60, deadline=None)
@given(requests=replies(largest=1), seed=st.integers(0, 2**32 - 1))
def test_what_is_missing_is_a_gap_and_the_account_closes(plan: Plan, requests: list[Reply], seed: int) -> None:
    """Rows are lost, broken or never come, in any order; the sum still holds and nothing is counted twice."""
    (request,) = requests
    rng = np.random.default_rng(seed)
    monitor, script = Monitor(plan), Script(plan)
    monitor.admit("r0", num_prompt=request.num_prompt, policy=None, fmt=Format.CHAT, prompt=request.prompt)
    expected: Counter[Gap] = Counter()
    kept = np.zeros(len(request.scores), dtype=bool)
    accounted = cursor = 0
    while cursor < len(request.scores):
        span = np.arange(cursor, min(cursor + int(rng.integers(1, 4)), len(request.scores)))
        cursor = int(span[-1]) + 1
        fate = rng.choice(["seen", "seen", "lost", "never comes", "broken", "torn"])
        if fate == "lost":
            monitor.lose({"r0": cursor, "stranger": 5}, Gap.NO_READOUTS)
            expected[Gap.NO_READOUTS] += cursor - accounted
            accounted = cursor
        elif fate != "never comes":
            if fate == "torn" and len(span) > 1:
                span = np.delete(span, rng.integers(len(span)))
            rows = script.rows(request.scores[span])
            if fate == "broken":
                rows[0, plan.bank.used_columns()[0]] = rng.choice([np.nan, np.inf, -np.inf])
            monitor.observe(script.step([("r0", span.tolist(), rows)]))
            expected[Gap.NOT_FINITE] += fate == "broken"
            expected[Gap.UNSEEN] += int(span[-1]) + 1 - accounted - len(span)
            accounted = int(span[-1]) + 1
            kept[span[1:] if fate == "broken" else span] = True
    expected[Gap.UNSEEN] += cursor - accounted
    sampled = request.num_positions - request.num_prompt
    ended = monitor.finish("r0", num_positions=request.num_positions, sampled=sampled, aborted=False)
    assert ended is not None
    assert ended.coverage.positions == request.num_positions
    assert {gap: count for gap, count in ended.coverage.gaps.items() if count} == +expected
    assert ended.coverage.scored == np.count_nonzero(kept[SKIP:])
    assert monitor.take_tally().gaps == ended.coverage.gaps
    assert ("on_gap" in ended.request.decided) == bool(expected.total())
    for place, check in enumerate(plan.checks):
        read = kept & reads(check, request)
        values = naive_values(
            check.aggregate, request.scores[read, plan.bank.index[check.detector]].astype(float).tolist()
        )
        statistic = (max(values) if check.stage is Stage.STREAM else values[-1]) if values else UNDEFINED
        assert close(ended.statistics[place : place + 1], np.array([statistic]))


@settings(max_examples=40, deadline=None)
@given(requests=replies(), seed=st.integers(0, 2**32 - 1), raised=st.floats(0.01, 2.0))
def test_a_higher_threshold_never_fires_more(plan: Plan, requests: list[Reply], seed: int, raised: float) -> None:
    def fired(lift: float) -> list[npt.NDArray[np.bool_]]:
        monitor, script = Monitor(plan), Script(plan)
        result = []
        for request in requests:
            monitor.admit(
                request.name, num_prompt=request.num_prompt, policy=None, fmt=Format.CHAT, prompt=request.prompt
            )
            rows = script.rows(request.scores - np.float32(lift))
            monitor.observe(script.step([(request.name, range(len(rows)), rows)]))
            ended = monitor.finish(request.name, num_positions=len(rows), sampled=0, aborted=False)
            assert ended is not None
            result.append(ended.fired)
        return result

    # All of these aggregates move with the scores, so lowering every score is raising every threshold.
    for low, high in zip(fired(0.0), fired(raised), strict=True):
        assert not np.any(high & ~low)
