"""A policy and its cards become checks with thresholds: from the card, a number, or a rate that the card can prove."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from monitor.compiled import CompiledRule
from monitor.monitor import Monitor
from monitor.policy import Plan
from monitor.types import Action
from monitor.yaml_file import PolicyError
from probes.aggregate.ema import Ema
from probes.aggregate.last import Last
from probes.aggregate.max import Max
from probes.artifact import Artifact
from probes.bank import BankError
from probes.card import Calibration, Format, Stage
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, rule, unit_artifact

BOTH = [calibration(fmt=Format.CHAT, threshold=1.0), calibration(fmt=Format.RAW, threshold=2.0)]


def compiled(
    folder: Path,
    rules: str,
    calibrations: Sequence[Calibration] = tuple(BOTH),
    *,
    policy: str = "",
    head: str = "",
    **card: Any,
) -> Plan:
    text = policy_text(rules, policy=policy, head=head)
    return plan_of(folder, text, {"harm": unit_artifact(make_card(calibrations=calibrations, **card))})


def only_rule(plan: Plan) -> CompiledRule:
    ((compiled_rule,),) = (policy.rules for policy in plan.policies)
    return compiled_rule


def thresholds(plan: Plan) -> dict[str, float]:
    return {fmt.value: value for fmt, value in plan.checks[only_rule(plan).verdicts[0]].thresholds.items()}


def refusal(folder: Path, rules: str, calibrations: Sequence[Calibration], **settings: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        compiled(folder, rules, calibrations, **settings)
    return str(caught.value).replace(f"{folder}/", "")


def test_the_card_gives_threshold_and_aggregate(tmp_path: Path) -> None:
    plan = compiled(tmp_path, rule("r"), skip_first=3)
    check = plan.checks[only_rule(plan).verdicts[0]]
    assert (check.aggregate, check.stage, check.skip_first, check.detector) == (Max(), Stage.PROMPT, 3, "harm")
    assert thresholds(plan) == {"chat": 1.0, "raw": 2.0}


def test_the_stage_chooses_the_calibration(tmp_path: Path) -> None:
    calibrations = [*BOTH, calibration(Stage.STREAM, aggregate=Ema(alpha=0.5), threshold=7.0)]
    plan = compiled(tmp_path, rule("r", stage="stream"), calibrations)
    assert thresholds(plan) == {"chat": 7.0}
    assert plan.checks[only_rule(plan).verdicts[0]].aggregate == Ema(alpha=0.5)


def test_a_number_holds_in_every_format_of_the_card(tmp_path: Path) -> None:
    assert thresholds(compiled(tmp_path, rule("r", when="above: {value: -0.5}"))) == {"chat": -0.5, "raw": -0.5}
    plan = compiled(tmp_path, rule("r", when="above: {value: 9}, aggregate: {kind: last}"), formats=[Format.CHAT])
    assert thresholds(plan) == {"chat": 9.0}
    assert plan.checks[only_rule(plan).verdicts[0]].aggregate == Last()


def test_a_rate_is_read_from_the_order_statistics(tmp_path: Path) -> None:
    """1000 benign requests prove 1 % with 4 above the threshold, and 0.5 % with 1."""
    calibrations = [calibration(num_benign=1000, threshold=99.0, top_scores=(9.0, 8.0, 7.0, 6.0, 5.0, 4.0))]
    assert thresholds(compiled(tmp_path, rule("r", when="above: {target_fpr: 0.01}"), calibrations)) == {"chat": 5.0}
    assert thresholds(compiled(tmp_path, rule("r", when="above: {target_fpr: 0.005}"), calibrations)) == {"chat": 8.0}


def test_a_rate_that_cannot_be_certified_may_only_flag(tmp_path: Path) -> None:
    calibrations = [calibration(num_benign=298, top_scores=(9.0, 8.0))]
    when = "above: {target_fpr: 0.01}"
    message = refusal(tmp_path, rule("r", when=when), calibrations)
    assert message.startswith("telltale.yaml:9: policies[0].rules[0].when.above.target_fpr: is 0.01")
    assert "298 benign requests cannot certify at 95% confidence: 1 more are needed" in message
    assert thresholds(compiled(tmp_path, rule("r", when=when, action="flag"), calibrations)) == {"chat": 9.0}


def test_a_card_that_keeps_too_few_scores(tmp_path: Path) -> None:
    calibrations = [calibration(num_benign=5000, top_scores=(9.0, 8.0))]
    for action in ("flag", "block"):
        message = refusal(tmp_path, rule("r", when="above: {target_fpr: 0.01}", action=action), calibrations)
        assert "keeps the 2 largest benign statistics, this rate needs 39" in message


def test_an_uncertified_threshold_of_the_card_may_only_flag(tmp_path: Path) -> None:
    calibrations = [calibration(num_benign=100, certified=False)]
    message = refusal(tmp_path, rule("r"), calibrations)
    assert message.startswith("telltale.yaml:9: policies[0].rules[0].do.action: is 'block'")
    assert "100 benign requests do not prove a rate of 0.01 at 95% confidence, 299 would" in message
    assert thresholds(compiled(tmp_path, rule("r", action="flag"), calibrations)) == {"chat": 1.0}
    assert thresholds(compiled(tmp_path, rule("r", when="above: {value: 3}"), calibrations))["chat"] == 3.0


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (rule("r", detector="hram"), "when.detector: is 'hram'. Did you mean 'harm'? Known: harm."),
        (rule("r", stage="stream"), "not calibrated for the stage 'stream' (calibrated: ['prompt'])"),
        (rule("r", stage="stream", when="above: {value: 1.0}"), "when.stage: detector 'harm' is not calibrated"),
        (
            rule("r", when="aggregate: {kind: mean}"),
            "no threshold for mean at the stage 'prompt' (calibrated: max at prompt)",
        ),
        (rule("r", when="aggregate: {kind: mean}, above: {target_fpr: 0.01}"), "no threshold for mean"),
    ],
)
def test_what_the_card_cannot_give_is_refused(tmp_path: Path, rules: str, words: str) -> None:
    message = refusal(tmp_path, rules, BOTH)
    assert message.startswith("telltale.yaml:9: policies[0].rules[0].when")
    assert words in message


def test_aggregates_are_compared_with_their_parameters(tmp_path: Path) -> None:
    calibrations = [calibration(aggregate=Ema(alpha=0.5))]
    assert thresholds(compiled(tmp_path, rule("r", when="aggregate: {kind: ema, alpha: 0.5}"), calibrations)) == {
        "chat": 1.0
    }
    assert "no threshold for ema(alpha=0.4)" in refusal(
        tmp_path, rule("r", when="aggregate: {kind: ema, alpha: 0.4}"), calibrations
    )


@pytest.mark.parametrize(
    ("rules", "policy", "expected"),
    [
        (rule("r", stage="stream"), "", 1),
        (rule("r", stage="stream", mode="shadow"), "", 0),
        (rule("r", stage="stream", action="flag"), "", 0),
        (rule("r", stage="prompt"), "", 0),
        (rule("r", stage="stream"), "hold_back: 0", 0),
        (rule("r", stage="prompt"), "hold_back: 1", 1),
        (rule("r", stage="stream"), "hold_back: 16", 16),
    ],
)
def test_tokens_are_held_back_where_a_rule_may_block_a_stream(
    tmp_path: Path, rules: str, policy: str, expected: int
) -> None:
    plan = compiled(tmp_path, rules, [*BOTH, calibration(Stage.STREAM)], policy=policy)
    assert plan.policies[0].hold_back == expected


def test_rules_share_equal_checks(tmp_path: Path) -> None:
    rules = "\n".join([rule("a"), rule("b", action="flag"), rule("c", when="above: {value: 3}")])
    plan = compiled(tmp_path, rules)
    first, second, third = plan.policies[0].rules
    assert first.verdicts == second.verdicts != third.verdicts
    assert len(plan.checks) == 2


def test_a_detector_without_a_rule_is_watched_as_calibrated(tmp_path: Path) -> None:
    other = [*BOTH, calibration(Stage.STREAM, aggregate=Ema())]
    artifacts: dict[str, Artifact] = {
        "harm": unit_artifact(make_card(calibrations=BOTH)),
        "other": unit_artifact(make_card("other", calibrations=other)),
    }
    plan = plan_of(tmp_path, policy_text(rule("r"), names=["harm", "other"]), artifacts)
    watched = {(plan.checks[check].detector, plan.checks[check].stage) for check in plan.policies[0].checks}
    assert watched == {("harm", Stage.PROMPT), ("other", Stage.PROMPT), ("other", Stage.STREAM)}
    assert [rule.verdicts for rule in plan.policies[0].rules] == [(0,)]


def test_the_text_of_a_rule_comes_before_that_of_the_policy(tmp_path: Path) -> None:
    rules = rule("a") + "\n" + rule("b").replace("action: block", "action: block, text: Stop.")
    plan = compiled(tmp_path, rules, policy="text: No.")
    assert [entry.text for entry in plan.policies[0].rules] == ["No.", "Stop."]


@pytest.mark.parametrize(
    ("mode", "on_uncalibrated", "fmt", "expected"),
    [
        ("enforce", "block", Format.RAW, Action.BLOCK),
        ("enforce", "flag", Format.RAW, Action.FLAG),
        ("enforce", "allow", Format.RAW, Action.ALLOW),
        ("enforce", "block", Format.CHAT, Action.ALLOW),
        ("shadow", "block", Format.RAW, Action.ALLOW),
    ],
)
def test_a_format_that_is_not_calibrated_follows_the_policy(
    tmp_path: Path, mode: str, on_uncalibrated: str, fmt: Format, expected: Action
) -> None:
    plan = compiled(tmp_path, rule("r", mode=mode), [BOTH[0]], policy=f"on_uncalibrated: {on_uncalibrated}")
    policy = plan.policies[0]
    assert policy.uncalibrated(plan.checks, fmt) is (fmt is Format.RAW and mode == "enforce")
    request = Monitor(plan).admit("a", num_prompt=1, policy=None, fmt=fmt)
    assert request.action.action is expected
    assert request.rule == ("on_uncalibrated" if expected is not Action.ALLOW else "")


def test_the_digest_sees_policy_weights_thresholds_and_skipped_positions(tmp_path: Path) -> None:
    def digest(**changes: Any) -> str:
        settings: dict[str, Any] = {"rules": rule("r"), "calibrations": BOTH} | changes
        return compiled(tmp_path, settings.pop("rules"), settings.pop("calibrations"), **settings).digest

    variants: list[dict[str, Any]] = [
        {},
        {"rules": rule("s")},
        {"rules": rule("r", mode="shadow")},
        {"calibrations": [BOTH[0], calibration(fmt=Format.RAW, threshold=2.5)]},
        {"skip_first": 2},
        {"layers": (1,)},
        {"head": "reserve: {directions: 9}\n"},
    ]
    assert len({digest(**variant) for variant in variants}) == len(variants)
    assert digest() == digest()


def test_too_little_room_is_said(tmp_path: Path) -> None:
    artifacts = {name: unit_artifact(make_card(name, calibrations=BOTH)) for name in ("harm", "other")}
    text = policy_text(rule("r"), head="reserve: {directions: 1}\n", names=["harm", "other"])
    with pytest.raises(BankError, match=r"reserve\.directions to 2 or more"):
        plan_of(tmp_path, text, artifacts)
