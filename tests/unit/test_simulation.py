"""What is told of another policy is what the monitor does under it, wherever anything is told at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, given, settings

from monitor.audit.redaction import KeptTexts
from monitor.audit.settings import AuditSettings
from monitor.check import Check, LengthLimits
from monitor.events import CoverageRecord, Decision, Event, canonical, parse_event
from monitor.monitor import Monitor
from monitor.policy import Plan
from monitor.report import decode_report, encode_report, make_report, take_tally
from monitor.simulation import Unknown, simulate
from monitor.simulation_tally import SimulationTally
from monitor.types import ON_GAP, Action, Gap, Mode
from probes.card import Format, Stage
from serving.engine.ledger import Ending, Ledger
from serving.engine.records import Records
from tests.unit.artifacts import make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.script import Script, chat

MAX, EMA = "aggregate: {kind: max}, above", "aggregate: {kind: ema, alpha: 0.5}, above"
NAMES = ("harm", "odd")


class Kept:
    """An outlet that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def submit(self, event: Event, content: object = None) -> None:
        self.events.append(event)


def plan(folder: Path, *rules: str, policy: str = "", formats: Sequence[Format] = tuple(Format)) -> Plan:
    cards = {name: make_card(name, skip_first=1, formats=formats) for name in NAMES}
    artifacts = {name: unit_artifact(cards[name], number) for number, name in enumerate(NAMES)}
    return plan_of(folder, policy_text("\n".join(rules), policy=policy, names=NAMES), artifacts)


def serve(under: Plan, scores: Sequence[tuple[float, float]], num_prompt: int, fmt: Format = Format.CHAT) -> Decision:
    """The event of a request with these scores, one token a step behind the prompt; a block ends it."""
    monitor, script, records, kept = Monitor(under), Script(under), Records(under), Kept()
    monitor.admit("a", num_prompt=num_prompt, policy=None, fmt=fmt, prompt=chat(num_prompt))
    ledger = Ledger(under, kept, KeptTexts(AuditSettings()), str)
    cuts = [0, num_prompt, *range(num_prompt + 1, len(scores) + 1)]
    at = 0
    for begin, end in pairwise(cuts):
        monitor.observe(script.step([("a", range(begin, end), script.rows(scores[begin:end]))]))
        at = end
        going = monitor.get("a")
        assert going is not None
        ended = []
        if end == len(scores) or going.action.action is Action.BLOCK:
            finished = monitor.finish("a", num_positions=at + 1, sampled=at + 1 - num_prompt, aborted=False)
            ended = [finished] if finished is not None else []
        report = make_report(monitor, [] if ended else [going], ended, take_tally(monitor, [0.0]))
        records.take_in(decode_report(encode_report(report)))
        if ended:
            break
    record = records.get("a")
    assert record is not None
    tokens = range(at + 1)
    ledger.ended(record, Ending("a", "a", prompt=tokens[:num_prompt], reply=tokens[num_prompt:], finish_reason="stop"))
    (event,) = (event for event in kept.events if isinstance(event, Decision))
    return event


def flat(when: object) -> str:
    """YAML in flow style."""
    return str(when).replace("'", "").replace("None", "null")


verdicts = st.builds(
    lambda detector, stage, value, kind: {
        "detector": detector,
        "stage": stage,
        "aggregate": {"kind": "max"} if kind == "max" else {"kind": "ema", "alpha": 0.5},
        "above": {"value": value},
    },
    st.sampled_from(NAMES),
    st.sampled_from(["prompt", "stream", "response"]),
    st.sampled_from([0.5, 1.0, 1.5, 2.0]),
    st.sampled_from(["max", "ema"]),
)
conditions = st.recursive(
    verdicts,
    lambda parts: st.one_of(
        st.lists(parts, min_size=2, max_size=2).map(lambda found: {"all": found}),
        st.lists(parts, min_size=2, max_size=2).map(lambda found: {"any": found}),
        parts.map(lambda found: {"not": found}),
    ),
    max_leaves=3,
)


def stages(when: Any) -> set[str]:
    if isinstance(when, dict) and "stage" in when:
        return {when["stage"]}
    parts = [part for found in when.values() for part in (found if isinstance(found, list) else [found])]
    return set().union(*(stages(part) for part in parts))


@st.composite
def written_rules(draw: st.DrawFn, name: str) -> str:
    when = draw(conditions)
    actions = ["flag"] if "response" in stages(when) or "not" in str(when) else ["flag", "block"]
    action, mode = draw(st.sampled_from(actions)), draw(st.sampled_from(["enforce", "shadow"]))
    return f"{{name: {name}, when: {flat(when)}, do: {{action: {action}}}, mode: {mode}}}"


# Rules that never fire, so that everything that the rules above may ask for is on record.
WATCHED = [
    rule(f"w{number}", detector=name, stage=stage, action="flag", when=f"{kind}: {{value: 99}}")
    for number, (name, stage, kind) in enumerate(product(NAMES, ("prompt", "stream", "response"), (MAX, EMA)))
]
scores = st.lists(st.tuples(*[st.sampled_from([0.0, 0.75, 1.25, 1.75, 2.25])] * 2), min_size=2, max_size=6)
# Without shrinking: an example takes a tenth of a second, and a failing one is small already.
FOLDER = settings(
    max_examples=100,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FOLDER
@given(rules=st.tuples(written_rules("a"), written_rules("b")), scored=scores, num_prompt=st.integers(1, 3))
def test_a_policy_over_its_own_record_does_what_it_did(
    tmp_path: Path, rules: tuple[str, str], scored: list[tuple[float, float]], num_prompt: int
) -> None:
    under = plan(tmp_path, *rules)
    event = serve(under, scored, min(num_prompt, len(scored)))
    found = simulate(under, under.policies[0], event)
    did = {rule.name for rule in event.rules}
    for name, told in found.rules.items():
        if told.fires is not None:
            assert told.fires == (name in did), name
        else:
            assert set(told.why.values()) == {Unknown.CUT_OFF}
            assert event.action is Action.BLOCK
    if event.action is not Action.BLOCK:
        assert found.action is event.action
    assert found.least.severity <= event.action.severity <= found.most.severity


@FOLDER
@given(
    old=st.tuples(written_rules("a"), written_rules("b")),
    new=st.tuples(written_rules("a"), written_rules("b")),
    scored=scores,
    num_prompt=st.integers(1, 3),
)
def test_what_is_told_of_another_policy_is_what_it_does(
    tmp_path: Path, old: tuple[str, str], new: tuple[str, str], scored: list[tuple[float, float]], num_prompt: int
) -> None:
    before, after = plan(tmp_path, *old, *WATCHED), plan(tmp_path, *new)
    num_prompt = min(num_prompt, len(scored))
    recorded, truth = serve(before, scored, num_prompt), serve(after, scored, num_prompt)
    found = simulate(after, after.policies[0], recorded)
    assert found.least.severity <= truth.action.severity <= found.most.severity
    did = {rule.name for rule in truth.rules}
    for name, told in found.rules.items():
        if told.fires is None:
            assert set(told.why.values()) == {Unknown.CUT_OFF}
        elif truth.action is not Action.BLOCK or told.fires is False:
            # Behind a block in the same reply, a rule may have had no time to fire.
            assert told.fires == (name in did), name


RECORDED = rule("seen", action="flag", when=f"{MAX}: {{value: 1.0}}")


def test_what_was_not_stored_is_said_and_nothing_is_made_up(tmp_path: Path) -> None:
    event = serve(plan(tmp_path, RECORDED), [(0, 0), (2, 2)], 2)
    other = plan(tmp_path, rule("new", action="block", when=f"{EMA}: {{value: 1.0}}"), RECORDED)
    found = simulate(other, other.policies[0], event)
    told = found.rules["new"]
    assert (told.fires, list(told.why.values())) == (None, [Unknown.NOT_STORED])
    assert "harm at prompt" in next(iter(told.why))
    assert (found.least, found.most, found.action) == (Action.FLAG, Action.BLOCK, None)


def test_a_statistic_of_another_detector_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    under = plan(tmp_path, RECORDED)
    event = serve(under, [(0, 0), (2, 2)], 2).model_copy(update={"artifacts": {"harm": "f" * 64}})
    told = simulate(under, under.policies[0], event).rules["seen"]
    assert (told.fires, list(told.why.values())) == (None, [Unknown.OTHER_ARTIFACT])


def test_what_a_recorded_block_cut_off_is_not_known(tmp_path: Path) -> None:
    strict = plan(tmp_path, rule("stop", stage="stream", when=f"{MAX}: {{value: 1.0}}"))
    event = serve(strict, [(0, 0), (0, 0), (1.25, 0), (3, 0)], 2)
    assert event.action is Action.BLOCK
    loose = plan(tmp_path, rule("stop", stage="stream", when=f"{MAX}: {{value: 2.0}}"))
    told = simulate(loose, loose.policies[0], event).rules["stop"]
    assert (told.fires, list(told.why.values())) == (None, [Unknown.CUT_OFF])
    stricter = plan(tmp_path, rule("stop", stage="stream", when=f"{MAX}: {{value: 0.5}}"))
    assert simulate(stricter, stricter.policies[0], event).rules["stop"].fires is True


def test_a_request_that_would_have_been_blocked_at_its_prompt_fires_nothing_later(tmp_path: Path) -> None:
    at_prompt, later = (
        rule("stop", when=f"{MAX}: {{value: 9}}"),
        rule("late", stage="stream", when=f"{MAX}: {{value: 1}}"),
    )
    event = serve(plan(tmp_path, at_prompt, later), [(0, 0), (2, 0), (2, 0)], 2)
    assert event.rule == "late"
    lower = plan(tmp_path, at_prompt.replace("9", "1"), later)
    found = simulate(lower, lower.policies[0], event)
    assert (found.rules["stop"].fires, found.rules["late"].fires, found.action) == (True, False, Action.BLOCK)


def test_a_block_at_the_end_ends_nothing_earlier(tmp_path: Path) -> None:
    event = serve(plan(tmp_path, RECORDED, *WATCHED), [(0, 0), (0, 0), (2, 0)], 2)
    late = rule("late", stage="response", action="block", when=f"{MAX}: {{value: 1.0}}")
    also = rule("also", stage="response", action="flag", when=f"{EMA}: {{value: 0.5}}")
    found = (after := plan(tmp_path, late, also)) and simulate(after, after.policies[0], event)
    assert (found.rules["late"].fires, found.rules["also"].fires, found.action) == (True, True, Action.BLOCK)
    # One in the stream does: what would have been read up to there is not known.
    stops = rule("stops", stage="stream", when=f"{MAX}: {{value: 1.0}}")
    found = (after := plan(tmp_path, stops, also)) and simulate(after, after.policies[0], event)
    assert (found.rules["stops"].fires, found.rules["also"].fires, found.action) == (True, None, Action.BLOCK)


def test_thresholds_by_length_are_those_of_the_recorded_length(tmp_path: Path) -> None:
    under = plan(tmp_path, RECORDED)
    event = serve(under, [(0, 0), (2, 2)], 2)
    (number,) = under.policies[0].rules[0].verdicts
    check = under.checks[number]
    assert isinstance(check, Check)
    limits = LengthLimits((5,), (1.5, 3.0))
    by_length = replace(check, by_length=MappingProxyType({Format.CHAT: limits}), thresholds={Format.CHAT: 1.5})
    changed = replace(under, checks=tuple(by_length if n == number else c for n, c in enumerate(under.checks)))

    def fires(prompt_tokens: int | None, statistic: float) -> tuple[bool | None, list[Unknown]]:
        verdicts = tuple(v.model_copy(update={"statistic": statistic}) for v in event.verdicts)
        said = event.model_copy(update={"prompt_tokens": prompt_tokens, "verdicts": verdicts})
        told = simulate(changed, changed.policies[0], said).rules["seen"]
        return told.fires, list(told.why.values())

    assert fires(6, 2.0) == (True, [])
    assert fires(7, 2.0) == (False, [])
    assert fires(None, 4.0) == (True, [])
    assert fires(None, 2.0) == (None, [Unknown.CUT_OFF])
    # At the end of a reply the length that was read is not on record.
    response = replace(by_length, stage=Stage.RESPONSE)
    changed = replace(under, checks=tuple(response if n == number else c for n, c in enumerate(under.checks)))
    event = event.model_copy(
        update={"verdicts": tuple(v.model_copy(update={"stage": Stage.RESPONSE}) for v in event.verdicts)}
    )
    assert [fires(6, value)[0] for value in (1.0, 2.0, 4.0)] == [False, None, True]
    assert fires(6, 2.0)[1] == [Unknown.LENGTH]


def test_sums_are_added_up_from_what_is_stored(tmp_path: Path) -> None:
    terms = [
        {"detector": name, "weight": weight, "aggregate": {"kind": "max"}} for name, weight in (("harm", 2), ("odd", 1))
    ]
    when = {"weigh": terms, "stage": "prompt", "sum": "statistic", "above": {"value": 4.0}}
    each = [rule(name, detector=name, action="flag", when=f"{MAX}: {{value: 9}}") for name in NAMES]
    event = serve(plan(tmp_path, *each), [(0, 0), (1.5, 1.25)], 2)
    for value, fires in ((4.0, True), (4.25, False)):
        summed = plan(
            tmp_path,
            f"{{name: sum, when: {flat(when | {'above': {'value': value}})}, do: {{action: flag}}, mode: enforce}}",
        )
        told = simulate(summed, summed.policies[0], event).rules["sum"]
        assert told.fires is fires


def test_gaps_uncalibrated_formats_and_rollouts(tmp_path: Path) -> None:
    event = serve(plan(tmp_path, RECORDED), [(0, 0), (2, 2)], 2)
    gap = event.model_copy(update={"coverage": CoverageRecord(positions=3, scored=1, gaps={Gap.UNSEEN: 1})})
    strict = plan(tmp_path, RECORDED, policy="on_gap: block")
    assert simulate(strict, strict.policies[0], gap).action is Action.BLOCK
    assert simulate(strict, strict.policies[0], event).rules[ON_GAP].fires is False
    chats = plan(tmp_path, RECORDED, policy="on_uncalibrated: block", formats=[Format.CHAT])
    raw = event.model_copy(update={"format": Format.RAW})
    assert simulate(chats, chats.policies[0], raw).action is Action.BLOCK
    some = plan(
        tmp_path,
        RECORDED.replace("mode: enforce", "mode: enforce, rollout: {percent: 50, by: tenant}").replace("flag", "block"),
    )
    found = simulate(some, some.policies[0], event.model_copy(update={"rules": ()}))
    assert (found.rules["seen"].fires, found.rules["seen"].mode, found.action) == (True, None, None)
    # If the record says for whom it was enforced, it is known.
    in_shadow = tuple(one.model_copy(update={"mode": Mode.SHADOW}) for one in event.rules)
    found = simulate(some, some.policies[0], event.model_copy(update={"rules": in_shadow}))
    assert found.action is Action.ALLOW


def test_a_rule_over_conversations_is_not_told_from_one_request(tmp_path: Path) -> None:
    when = f"of: prompt, accumulate: {{kind: cusum}}, {MAX}: {{value: 5}}"
    over = rule("over", stage="conversation", action="flag", when=when)
    event = serve(plan(tmp_path, RECORDED), [(0, 0), (2, 2)], 2)
    after = plan(tmp_path, over, RECORDED)
    found = simulate(after, after.policies[0], event)
    assert (found.rules["over"].fires, list(found.rules["over"].why.values())) == (None, [Unknown.CONVERSATION])
    assert (found.rules["seen"].fires, found.action) == (True, Action.FLAG)


def test_the_tally_counts_what_changes(tmp_path: Path) -> None:
    old = plan(tmp_path, RECORDED)
    new = plan(tmp_path, RECORDED.replace("1.0", "2.0").replace("flag", "block"))
    tally = SimulationTally(new)
    for top in (0.5, 1.5, 2.5, 3.5):
        tally.take(serve(old, [(0, 0), (top, 0)], 2))
    tally.take(serve(old, [(0, 0), (3, 0)], 2).model_copy(update={"policy": "gone"}))
    (count,) = tally.counts
    found = count.rules["seen"]
    assert (found.would, found.did, found.more, found.fewer, found.unknown) == (2, 3, 0, 1, 0)
    assert count.actions == {
        (Action.ALLOW, Action.ALLOW): 1,
        (Action.FLAG, Action.ALLOW): 1,
        (Action.FLAG, Action.BLOCK): 2,
    }
    assert tally.without_policy == {"gone": 1}


def test_an_event_from_the_store_says_the_same(tmp_path: Path) -> None:
    under = plan(tmp_path, RECORDED)
    event = serve(under, [(0, 0), (2, 2)], 2)
    again = parse_event(canonical(event))
    assert isinstance(again, Decision)
    assert simulate(under, under.policies[0], again) == simulate(under, under.policies[0], event)
