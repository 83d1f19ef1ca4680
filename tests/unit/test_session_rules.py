"""Rules over conversations in a policy file, and what the monitor does with those that stand against a request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from monitor.monitor import Monitor
from monitor.policy import Plan
from monitor.rollout import Share, Subject, Subjects
from monitor.strictest import strictest
from monitor.types import ON_SESSION_FAILURE, Action, Mode
from monitor.yaml_file import PolicyError
from probes.card import Format
from serving.cli import app
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, saved_artifact, unit_artifact
from tests.unit.script import Script, chat
from tests.unit.test_detector_kinds import artifact_of

CARD = make_card(calibrations=[calibration()])
WHEN = "detector: harm, stage: conversation, of: prompt, accumulate: {kind: cusum}, above: {value: 5}"
ANOTHER = "{name: other, when: {detector: harm, stage: prompt}, do: {action: flag}, mode: enforce}"


def over(name: str, do: str = "action: block", when: str = WHEN, mode: str = "enforce", more: str = "") -> str:
    return f"{{name: {name}, when: {{{when}}}, do: {{{do}}}, mode: {mode}{more}}}"


def plan(folder: Path, *rules: str, head: str = "") -> Plan:
    return plan_of(folder, policy_text("\n".join(rules), head=head), {"harm": unit_artifact(CARD)})


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (over("r", when=WHEN.replace("of: prompt, ", "")), "of: is missing. It is: which statistic of each request"),
        (over("r", when=WHEN.replace(", above: {value: 5}", "")), "above: is missing"),
        (over("r", when=WHEN.replace("value: 5", "target_fpr: 0.1")), "'target_fpr' is not a key here"),
        (
            over("r", when=WHEN.replace("cusum", "cusums")),
            "accumulator kind 'cusums' is not known. Did you mean 'cusum'",
        ),
        (over("r", when=f"{WHEN}, by: request"), "by: is 'request'"),
        (over("r", when=f"{WHEN}, acumulate: 1"), "'acumulate' is not a key here. Did you mean 'accumulate'"),
        (over("r", when=WHEN.replace("harm", "harn")), "Did you mean 'harm'"),
        (over("r", when=WHEN.replace("of: prompt", "of: response")), "say which aggregate to use"),
        (over("r", "action: block, scope: request"), "'scope' belongs to one choice"),
        (over("r", "action: steer, steer: calm, gate: token"), "'gate' belongs to rows of a request"),
        (over("r", "action: regenerate, system: Be kind."), "regenerates at the stage 'conversation'"),
        (over("r", "action: route, to: {model: other}"), "routes at the stage 'conversation'"),
        (over("r", "action: block, until: forever"), "until: is 'forever'"),
        (over("r", when=f"all: [{{{WHEN}}}]"), "when.all[0] is a verdict on a conversation, which stands alone"),
        (over("r", when=f"any: [{{not: {{{WHEN}}}}}]"), "when.any[0].not is a verdict on a conversation"),
        (ANOTHER.replace("flag", "flag, until: 30m"), "'until' says how long a rule over a conversation stands"),
        (over("on_session_failure"), "'on_session_failure' is what decisions of that policy key are called"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(tmp_path: Path, rule: str, words: str) -> None:
    with pytest.raises(PolicyError) as caught:
        plan(tmp_path, rule)
    message = str(caught.value)
    assert "telltale.yaml:" in message
    assert words in message


def test_a_kind_that_finds_the_unusual_does_not_block_conversations_alone(tmp_path: Path) -> None:
    artifact = artifact_of("novelty", np.random.default_rng(10))
    when = WHEN.replace("harm", "novelty") + ", aggregate: {kind: mean}"
    for action in ("flag", "block"):
        text = policy_text(over("odd", f"action: {action}", when=when), names=["novelty"])
        if action == "flag":
            plan_of(tmp_path, text, {"novelty": artifact})
            continue
        with pytest.raises(PolicyError, match="finds what is unusual and not what is harmful"):
            plan_of(tmp_path, text, {"novelty": artifact})


def test_history_goes_on_under_another_threshold_and_mode_and_not_under_another_detector(tmp_path: Path) -> None:
    def key(rule: str, dimension: int = 0, digest: str = "0" * 64) -> str:
        artifact = unit_artifact(CARD.model_copy(update={"tensors_digest": digest}), dimension)
        made = plan_of(tmp_path, policy_text(f"{ANOTHER}\n{rule}"), {"harm": artifact})
        (found,) = made.policies[0].conversations
        assert found.conversation is not None
        return found.conversation.key

    first = key(over("r"))
    assert first == key(over("r", when=WHEN.replace("5", "6"))) == key(over("r", "action: flag", mode="shadow"))
    others = [
        key(over("s")),
        key(over("r", when=WHEN.replace("kind: cusum", "kind: cusum, drift: 1.0"))),
        key(over("r", when=f"{WHEN}, aggregate: {{kind: mean}}")),
        key(over("r", when=f"{WHEN}, by: tenant")),
        key(over("r"), digest="1" * 64),
    ]
    assert len({first, *others}) == 6


def test_only_rules_over_conversations_can_be_imposed_and_only_those_of_the_policy(tmp_path: Path) -> None:
    made = plan(tmp_path, over("stop"), over("note", "action: flag"), over("try", mode="shadow"), ANOTHER)
    monitor, script = Monitor(made), Script(made)
    expected = {
        (): ("allow", ""),
        ("other", "nothing"): ("allow", ""),
        ("note",): ("flag", "note"),
        ("try",): ("allow", ""),
        ("note", "try", "stop"): ("block", "stop"),
    }
    for number, (imposed, decided) in enumerate(expected.items()):
        name = f"r{number}"
        request = monitor.admit(name, num_prompt=2, policy=None, fmt=Format.CHAT, prompt=chat(2), imposed=imposed)
        assert (request.action.action.value, request.rule) == decided
        # Nothing in a request makes such a rule fire by itself.
        monitor.observe(script.step([(name, range(2), script.rows([0, 0.5]))]))
        assert (request.action.action.value, request.rule) == decided
    acted = monitor.take_tally().acted
    assert acted["stop", Action.BLOCK, Mode.ENFORCE, "default"] == 1
    assert acted["note", Action.FLAG, Mode.ENFORCE, "default"] == 2
    assert acted["try", Action.BLOCK, Mode.SHADOW, "default"] == 2


@pytest.mark.parametrize(("says", "action"), [("block", "block"), ("flag", "flag"), ("allow", "allow")])
def test_what_happens_without_a_store_is_what_the_file_says(tmp_path: Path, says: str, action: str) -> None:
    head = f"sessions: {{url: 'postgresql://h/d', on_failure: {says}}}\n"
    monitor = Monitor(plan(tmp_path, over("stop"), head=head))
    request = monitor.admit(
        "a", num_prompt=2, policy=None, fmt=Format.CHAT, prompt=chat(2), imposed=(ON_SESSION_FAILURE,)
    )
    assert request.action.action.value == action
    assert monitor.take_tally().acted[ON_SESSION_FAILURE, Action(says), Mode.ENFORCE, "default"] == 1


def test_outside_its_rollout_a_rule_over_conversations_runs_in_shadow(tmp_path: Path) -> None:
    made = plan(tmp_path, over("stop", more=", rollout: {percent: 50, by: tenant}"))
    key, monitor = b"key", Monitor(made, rollout_key=b"key")
    found = set()
    for number in range(20):
        who = Subjects(f"tenant-{number}")
        request = monitor.admit(
            f"r{number}", num_prompt=2, policy=None, fmt=Format.CHAT, prompt=chat(2), subjects=who, imposed=("stop",)
        )
        inside = Share(50, Subject.TENANT).holds(key, "stop", who)
        assert request.action.action is (Action.BLOCK if inside else Action.ALLOW)
        found.add(inside)
    assert found == {False, True}


def test_a_format_that_the_card_does_not_list_is_uncalibrated(tmp_path: Path) -> None:
    card = make_card(calibrations=[calibration()], formats=[Format.CHAT])
    made = plan_of(tmp_path, policy_text(over("stop")), {"harm": unit_artifact(card)})
    (policy,) = made.policies
    assert policy.uncalibrated(made.checks, Format.RAW)
    assert not policy.uncalibrated(made.checks, Format.CHAT)


def test_the_strictest_policy_has_none(tmp_path: Path) -> None:
    made = plan(tmp_path, over("stop"), ANOTHER)
    (policy,) = made.policies
    both = strictest([policy, replace(policy, name="second")])
    assert [rule.name for rule in both.rules] == ["default/other", "second/other"]


def test_check_says_it_in_words(tmp_path: Path) -> None:
    saved_artifact(tmp_path, CARD)
    path = tmp_path / "telltale.yaml"
    head = "sessions: {idle: 20m, per_tenant: 7}\n"
    path.write_text(policy_text(over("stop", "action: block, until: 90s"), head=head))
    result = CliRunner().invoke(app, ["check", str(path)], env={"COLUMNS": "250"})
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert (
        "stop blocks the next requests of a session as its client names it, for 90 s, once cusum(drift=0.0) over its "
        "requests of harm (max at prompt) lies above 5. A client that names another session, or none, is not the same"
    ) in said
    assert "sessions: in memory, of one process; 7 of a tenant" in said
