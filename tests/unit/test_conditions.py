"""Conditions that join verdicts: three-valued logic against its plain definition, any chunking, and what is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from typer.testing import CliRunner

from monitor.condition import AllOf, AnyOf, Condition, NotOf, Truth, Verdict, verdicts_of
from monitor.monitor import Monitor
from monitor.policy import Plan
from monitor.types import Action, Mode
from monitor.yaml_file import PolicyError
from probes.card import Format, Stage
from serving.cli import app
from tests.unit.artifacts import make_card, plan_of, policy_text, rule, saved_artifact, unit_artifact
from tests.unit.script import Case, Script, chat

NAMES = ("a", "b", "c")
SKIP = 1

conditions = st.recursive(
    st.builds(Verdict, st.integers(0, 3)),
    lambda inner: st.one_of(
        st.builds(NotOf, inner),
        st.builds(AllOf, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(AnyOf, st.lists(inner, min_size=1, max_size=3).map(tuple)),
    ),
    max_leaves=6,
)


def two_valued(condition: Condition, values: tuple[bool, ...]) -> bool:
    match condition:
        case Verdict():
            return values[condition.number]
        case NotOf():
            return not two_valued(condition.part, values)
        case AllOf():
            return all(two_valued(part, values) for part in condition.parts)
        case AnyOf():
            return any(two_valued(part, values) for part in condition.parts)


@settings(max_examples=200, deadline=None)
@given(condition=conditions, known=st.tuples(*[st.sampled_from([True, False, None])] * 4))
def test_what_is_said_holds_however_the_unknown_turns_out(condition: Condition, known: tuple[Truth, ...]) -> None:
    said = condition.truth(lambda number: known[number])
    worlds = product(*[[value] if value is not None else [False, True] for value in known])
    possible = {two_valued(condition, world) for world in worlds}
    assert said is None or possible == {said}
    if None not in known:
        assert said in possible
    once = len({number for number, _ in verdicts_of(condition)}) == len(list(verdicts_of(condition)))
    if once:  # where no verdict stands twice, nothing that could be said is left unsaid
        assert (said is None) == (len(possible) == 2)


def artifacts(*names: str) -> dict[str, Any]:
    """Detectors that each read a dimension of their own."""
    return {
        name: unit_artifact(make_card(name, skip_first=SKIP, layers=(number % 2,)), number)
        for number, name in enumerate(names or NAMES)
    }


def flow(value: object) -> str:
    """A condition as it stands in a policy file."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return str(value)


def one_rule(when: object, *, action: str = "flag", name: str = "r", mode: str = "enforce") -> str:
    return f"{{name: {name}, when: {flow(when)}, do: {{action: {action}}}, mode: {mode}}}"


def verdict(detector: str, stage: str, above: float = 0.5, kind: str = "max") -> dict[str, Any]:
    return {"detector": detector, "stage": stage, "aggregate": {"kind": kind}, "above": {"value": above}}


verdicts = st.one_of(
    st.builds(verdict, st.sampled_from(NAMES), st.sampled_from(["prompt", "stream", "response"]),
              st.sampled_from([-0.5, 0.5, 1.0, 1.6]), st.sampled_from(["max", "mean", "last"])),
    st.builds(
        lambda stage, weights, above: {
            "weigh": [
                {"detector": name, "weight": weight, "aggregate": {"kind": "mean"}}
                for name, weight in zip(NAMES, weights, strict=False)
            ],
            "stage": stage,
            "above": {"value": above},
        },
        st.sampled_from(["prompt", "stream", "response"]),
        st.lists(st.sampled_from([0.25, 1.0, 2.0]), min_size=2, max_size=3),
        st.sampled_from([-0.5, 0.5, 1.5]),
    ),
)  # fmt: skip
written = st.recursive(
    verdicts,
    lambda inner: st.one_of(
        st.builds(lambda part: {"not": part}, inner),
        st.builds(lambda parts: {"all": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda parts: {"any": parts}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)


class Plain:
    """What a condition means, written down a second time: on all scores up to a token, with nothing remembered."""

    def __init__(self, scores: npt.NDArray[np.float32], num_prompt: int) -> None:
        self.scores = scores.astype(float)
        self.num_prompt = num_prompt

    def statistic(self, detector: str, stage: str, kind: str, seen: int) -> float:
        column = self.scores[:, NAMES.index(detector)]
        read = column[SKIP : min(seen, self.num_prompt)] if stage == "prompt" else column[self.start : seen]
        value = {"max": np.max, "mean": np.mean, "last": lambda scores: scores[-1]}[kind]
        if len(read) == 0:
            return -np.inf
        if stage == "stream":
            return float(max(value(read[: end + 1]) for end in range(len(read))))
        return float(value(read))

    @property
    def start(self) -> int:
        return max(SKIP, self.num_prompt)

    def fires(self, when: dict[str, Any], seen: int) -> bool:
        stage, above = when["stage"], when["above"]["value"]
        if "weigh" not in when:
            return self.statistic(when["detector"], stage, when["aggregate"]["kind"], seen) > above
        terms = [
            term["weight"] * self.statistic(term["detector"], stage, term["aggregate"]["kind"], seen)
            for term in when["weigh"]
        ]
        return sum(terms) > above

    def truth(self, when: dict[str, Any], seen: int, *, ended: bool) -> Truth:
        if "not" in when:
            inner = self.truth(when["not"], seen, ended=ended)
            return None if inner is None else not inner
        for key, decides in (("all", False), ("any", True)):
            if key in when:
                found = [self.truth(part, seen, ended=ended) for part in when[key]]
                return decides if decides in found else (None if None in found else not decides)
        if when["stage"] == "prompt":
            return self.fires(when, seen) if seen >= self.num_prompt else None
        if when["stage"] == "stream":
            return True if seen >= self.num_prompt and self.fires(when, seen) else (False if ended else None)
        return self.fires(when, seen) if ended else None


@settings(max_examples=150, deadline=None)
@given(when=written, seed=st.integers(0, 2**32 - 1), num_prompt=st.integers(1, 6), generated=st.integers(0, 8))
def test_rules_fire_as_defined_in_any_chunks(when: dict[str, Any], seed: int, num_prompt: int, generated: int) -> None:
    rng = np.random.default_rng(seed)
    # Quarters: sums and means of few of them are exact, so that both sides agree on which side of a limit they lie.
    scores = (rng.integers(-8, 9, (num_prompt + generated, 3)) / 4).astype(np.float32)
    with TemporaryDirectory() as folder:
        plan = plan_of(Path(folder), policy_text(one_rule(when), names=NAMES), artifacts())
    monitor, script, plain = Monitor(plan), Script(plan), Plain(scores, num_prompt)
    # A stranger beside it: sums are of one request's own statistics.
    for name in ("other", "it"):
        monitor.admit(name, num_prompt=num_prompt, policy=None, fmt=Format.CHAT, prompt=chat(num_prompt))
    seen = 0
    while seen < len(scores):
        end = int(rng.integers(seen + 1, len(scores) + 1))
        parts = [("it", range(seen, end), script.rows(scores[seen:end]))]
        parts.insert(0, ("other", range(seen, end), script.rows(rng.standard_normal((end - seen, 3)))))
        monitor.observe(script.step(parts))
        seen = end
        live = monitor.get("it")
        assert live is not None
        assert ("r" in live.decided) == (plain.truth(when, seen, ended=False) is True)
        expected = plain.truth(when, seen, ended=True) is True
        shown = monitor.snapshot([live]).decided.get("it")
        assert (shown is not None and shown.rule == "r") == expected
    ended = monitor.finish("it", num_positions=len(scores), sampled=0, aborted=False)
    assert ended is not None
    assert ("r" in ended.request.decided) == (plain.truth(when, seen, ended=True) is True)


def case_of(folder: Path, *rules: str, **settings: Any) -> Case:
    return Case(plan_of(folder, policy_text("\n".join(rules), names=NAMES, **settings), artifacts()))


def test_a_prompt_verdict_is_remembered_in_the_stream(tmp_path: Path) -> None:
    case = case_of(tmp_path, one_rule({"all": [verdict("a", "prompt"), verdict("b", "stream")]}, action="block"))
    for name, prompt in (("yes", [[0, 0, 0], [9, 0, 0]]), ("no", [[0, 0, 0], [0, 0, 0]])):
        case.admit(name, num_prompt=2)
        assert case.see(prompt, name=name) == ("allow", "")  # type: ignore[arg-type]
        assert case.see([[0, 0, 0]], start=2, name=name) == ("allow", "")  # type: ignore[list-item]
        expected = ("block", "r") if name == "yes" else ("allow", "")
        assert case.see([[0, 9, 0]], start=3, name=name) == expected  # type: ignore[list-item]


def test_an_exception_counts_only_once_it_is_known(tmp_path: Path) -> None:
    """``not`` of a prompt verdict holds when the prompt is through, not while it is being read."""
    case = case_of(
        tmp_path, one_rule({"all": [verdict("a", "prompt"), {"not": verdict("b", "prompt")}]}, action="block")
    )
    case.admit("plain", num_prompt=3)
    assert case.see([[0, 0, 0], [9, 0, 0]], name="plain") == ("allow", "")  # type: ignore[list-item]
    assert case.see([[0, 0, 0]], start=2, name="plain") == ("block", "r")  # type: ignore[list-item]
    case.admit("excused", num_prompt=3)
    assert case.see([[0, 0, 0], [9, 0, 0], [0, 9, 0]], name="excused") == ("allow", "")  # type: ignore[list-item]


def test_nothing_is_known_in_a_format_without_threshold(tmp_path: Path) -> None:
    cards = artifacts()
    cards["b"] = unit_artifact(make_card("b", formats=[Format.CHAT]), 1)
    rules = one_rule({"all": [verdict("a", "prompt"), {"not": verdict("b", "prompt")}]})
    case = Case(plan_of(tmp_path, policy_text(rules, names=NAMES, policy="on_uncalibrated: allow"), cards))
    for name, fmt, expected in (("chat", Format.CHAT, "flag"), ("raw", Format.RAW, "allow")):
        case.admit(name, num_prompt=2, fmt=fmt)
        assert case.see([[0, 0, 0], [9, 0, 0]], name=name)[0] == expected  # type: ignore[list-item]


def test_of_rules_that_fire_together_the_first_in_the_file_decides(tmp_path: Path) -> None:
    both = {"any": [verdict("a", "prompt"), verdict("b", "prompt")]}
    case = case_of(
        tmp_path, rule("later", detector="a", when="aggregate: {kind: max}, above: {value: 99}"),
        one_rule(both, action="block", name="first"),
        rule("second", detector="a", when="aggregate: {kind: max}, above: {value: 0.5}"),
    )  # fmt: skip
    case.admit(num_prompt=2)
    assert case.see([[0, 0, 0], [9, 9, 0]]) == ("block", "first")  # type: ignore[list-item]
    assert case.monitor.take_tally().acted == {
        ("first", Action.BLOCK, Mode.ENFORCE, "default"): 1,
        ("second", Action.BLOCK, Mode.ENFORCE, "default"): 1,
    }


STEER = "steer, steer: s, gate: latched"
REFUSED = [
    ({"all": []}, "flag", "when.all: ", "at least 1 item"),
    ({"all": [verdict("a", "prompt")], "detector": "a"}, "flag", "when.detector: ", "not a key here. Known: all."),
    ({"al": []}, "flag", "when.al: ", "Known: above, aggregate, all, any, detector, not, segments, stage, weigh."),
    ({"any": [{"not": {"detector": "a", "stage": "prmpt"}}]}, "flag", "when.any[0].not.stage: ", "mean 'prompt'"),
    ({"not": verdict("d", "prompt")}, "flag", "when.not.detector: ", "is 'd'. "),
    ({"not": {"detector": "a", "stage": "prompt"}}, "flag", "when.not.stage: ", "not calibrated for the stage"),
    ({"any": [verdict("a", "prompt"), verdict("b", "response")]}, STEER, "rules[0]: ", "(when.any[1]): by then"),
    ({"any": [verdict("a", "prompt"), {"not": verdict("b", "stream")}]}, STEER, "rules[0]: ", "steers on 'not' of a"),
    ({"any": [verdict("a", "prompt"), verdict("b", "stream")]}, "regenerate, system: x", "rules[0]: ", "two rules"),
    ({"not": {"all": [verdict("a", "prompt"), verdict("b", "response")]}}, "route, to: {model: m}", "rules[0]: ",
     "two rules"),
    ({"all": [verdict("a", "prompt"), verdict("b", "stream")]}, "regenerate, system: x, otherwise: release",
     "rules[0]: ", "one verdict"),
    (verdict("a", "prompt"), "regenerate, system: x, otherwise: release", "rules[0]: ", "one verdict"),
    (verdict("a", "prompt"), "regenerate", "rules[0].do: ", "exactly one of 'system'"),
    (verdict("a", "prompt"), "escalate, to: {judge: '{text}'}", "rules[0].do: ", "also needs 'on_failure'"),
    (verdict("a", "prompt"), "escalate, to: {model: m}, on_failure: block", "rules[0].do: ", "names a 'probe'"),
    (verdict("a", "prompt"), "route, to: {judge: '{text}'}", "rules[0].do: ", "that of 'route'"),
    (verdict("a", "prompt"), "escalate, to: {judge: 'no text'}, on_failure: block", "rules[0].do.to: ", "exactly once"),
    (verdict("a", "prompt"), "route, to: {upstream: 'http://far.example/v1'}", "do.to.upstream: ", "unencrypted"),
    (verdict("a", "prompt"), "route, to: {upstream: 'https://me:pw@far.example'}", "do.to.upstream: ", "'key_env'"),
    (verdict("a", "prompt"), "route, to: {upstream: 'ftp://far.example'}", "do.to.upstream: ", "https://"),
    (verdict("a", "prompt"), "route, to: {model: m, key_env: K}", "do.to: ", "there is none here"),
    (verdict("a", "prompt"), "route, to: {model: m}, timeout: 6m", "rules[0].do: ", "between 100ms and 5m"),
    (verdict("a", "prompt"), "escalate, to: {probe: {detector: d, stage: stream}}, on_failure: block",
     "do.to.probe.detector: ", "is 'd'. "),
    ({"weigh": [{"detector": "a", "weight": 1}], "stage": "prompt", "above": {"value": 1}}, "flag", "when.weigh: ",
     "at least 2 items"),
    ({"weigh": [{"detector": "a", "weight": 1}] * 2, "stage": "prompt", "above": {"target_fpr": 0.1}}, "flag",
     "when.above.target_fpr: ", "not a key here. Known: value."),
    ({"weigh": [{"detector": "a", "weight": 0}] * 2, "stage": "prompt", "above": {"value": 1}}, "flag",
     "when.weigh[0]: ", "count for nothing"),
    ({"weigh": [{"detector": "a", "weight": 1}] * 2, "stage": "prompt", "above": {"value": 1}}, "flag",
     "when.weigh[0].detector: ", "say which aggregate to use"),
    ({"weigh": [{"detector": "a", "weight": -1, "aggregate": {"kind": "max"}}] * 2, "stage": "stream",
      "above": {"value": 1}}, "flag", "when.weigh[0].weight: ", "Use a positive weight"),
    ({"weigh": [{"detector": "a", "weight": 1, "aggregate": {"kind": "max"}}] * 2, "stage": "prompt",
      "sum": "probability", "above": {"value": 1}}, "flag", "when.weigh[0].detector: ", "Use sum: statistic"),
]  # fmt: skip


@pytest.mark.parametrize(("when", "action", "place", "words"), REFUSED)
def test_what_cannot_be_is_refused_with_its_place(
    tmp_path: Path, when: dict[str, Any], action: str, place: str, words: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        case_of(tmp_path, one_rule(when, action=action))
    message = str(caught.value)
    assert "telltale.yaml:11: policies[0]" in message
    assert place in message
    assert words in message


def test_a_stream_is_held_back_where_a_joined_rule_may_block_it(tmp_path: Path) -> None:
    joined = one_rule({"all": [verdict("a", "prompt"), verdict("b", "stream")]}, action="block")
    at_prompt = one_rule({"all": [verdict("a", "prompt"), verdict("b", "prompt")]}, action="block")
    for rules, expected in ((joined, 1), (at_prompt, 0)):
        assert case_of(tmp_path, rules).plan.policies[0].hold_back == expected


def test_check_says_each_rule_in_words(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        saved_artifact(tmp_path, make_card(name), number)
    rules = [
        one_rule({"all": [verdict("a", "prompt"), {"not": verdict("b", "prompt")}]}, action="block", name="first"),
        one_rule({"any": [verdict("a", "stream"), {"all": [verdict("b", "prompt"), verdict("c", "response")]}]},
                 name="second", mode="shadow"),
    ]  # fmt: skip
    (tmp_path / "telltale.yaml").write_text(policy_text("\n".join(rules), names=NAMES))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "telltale.yaml")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "first blocks, before the first token, if a (max at prompt) and not (b (max at prompt))." in said
    assert (
        "second would flag, when the reply has ended at the latest, if a (max at stream) or (b (max at prompt) and c "
        "(max at response))." in said
    )


def stages(plan: Plan) -> list[Stage]:
    return [check.stage for check in plan.checks]


def test_equal_verdicts_of_joined_and_simple_rules_are_kept_once(tmp_path: Path) -> None:
    simple = rule("simple", detector="a", when="aggregate: {kind: max}, above: {value: 0.5}")
    joined = one_rule({"any": [verdict("b", "stream"), verdict("a", "prompt")]})
    plan = case_of(tmp_path, simple, joined).plan
    assert stages(plan) == [Stage.PROMPT, Stage.STREAM]
    assert [entry.verdicts for entry in plan.policies[0].rules] == [(0,), (1, 0)]
