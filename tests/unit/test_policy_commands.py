"""``telltale policy diff`` and ``telltale policy test``: what changes in words, and what recorded scores lead to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from monitor.trial.cases import Case, CaseError, Trace, read_cases
from monitor.trial.replay import Trial
from probes.card import Format, Stage
from serving.cli import app
from serving.deployment import check_policy
from tests.unit.artifacts import calibration, make_card, policy_text, rule, saved_artifact

RULES = (
    rule("stop", action="block"),
    rule("cut", stage="stream", action="block"),
    rule("watch", detector="other", stage="stream", action="flag", mode="shadow"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("harm", "other")):
        stages = [calibration(stage, fmt=fmt) for stage in (Stage.PROMPT, Stage.STREAM) for fmt in Format]
        saved_artifact(tmp_path, make_card(name, calibrations=stages, layers=(0,)), number)
    (tmp_path / "policy.yaml").write_text(policy_text("\n".join(RULES), names=("harm", "other")))
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["policy", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def scores(prompt: list[float], reply: list[float] | None = None, other: float = 0.0) -> dict[str, Any]:
    return {
        "harm": {"prompt": prompt, "reply": reply or []},
        "other": {"prompt": [0.0] * len(prompt), "reply": [other] * len(reply or [])},
    }


CASES = [
    ({"scores": scores([0, 0, 9])}, {"action": "block", "rule": "stop", "stage": "prompt", "at": 2}),
    ({"scores": scores([9, 0, 0])}, {"action": "allow", "rules": []}),  # the sink is not read
    (
        {"scores": scores([0, 0], [0, 0, 9, 0])},
        {"action": "block", "rule": "cut", "stage": "stream", "at": 4, "rules": ["cut"]},
    ),
    ({"scores": scores([0, 0], [0, 0], other=5)}, {"action": "allow", "rules": ["watch"]}),
    ({"format": "raw", "scores": scores([0, 0, 9])}, {"action": "block", "rules": ["cut", "stop"]}),
]


def write(folder: Path, cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> Path:
    path = folder / "cases.yaml"
    listed = [{"name": f"case {number}", **case, "expect": expect} for number, (case, expect) in enumerate(cases)]
    path.write_text(json.dumps({"cases": listed}))  # JSON is YAML
    return path


def test_cases_that_are_judged_as_expected_pass(folder: Path) -> None:
    code, output = run("test", folder / "policy.yaml", "--cases", write(folder, CASES))
    assert (code, "5 of 5 cases as expected" in output) == (0, True), output


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("action", "flag", "action: expected flag, found block"),
        ("rule", "cut", "rule: expected cut, found stop"),
        ("stage", "stream", "stage: expected stream, found prompt"),
        ("at", 1, "at: expected 1, found 2"),
        ("rules", ["cut", "stop"], "rules: expected cut, stop, found stop"),
    ],
)
def test_what_differs_is_said_and_ends_with_code_1(folder: Path, key: str, value: object, line: str) -> None:
    case, expected = CASES[0]
    code, output = run("test", folder / "policy.yaml", "--cases", write(folder, [(case, {**expected, key: value})]))
    assert code == 1
    assert line in output
    assert "FAILED case 0: block by stop (prompt, at position 2)" in output


DEFERRED = (
    '{name: again, when: {detector: harm, stage: stream}, do: {action: regenerate, system: "Be kind."}, mode: enforce}',
    "{name: away, when: {detector: harm, stage: prompt}, do: {action: route, to: {model: other}}, mode: enforce}",
    "{name: asked, when: {detector: other, stage: stream}, mode: enforce, "
    'do: {action: escalate, to: {classifier: "http://127.0.0.1:9"}, on_failure: block}}',
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (scores([0, 0, 9]), {"action": "route", "rule": "away", "stage": "prompt", "at": 2}),
        (scores([0, 0], [0, 9, 0]), {"action": "regenerate", "rule": "again", "stage": "stream", "at": 3}),
        (scores([0, 0], [0, 0], other=5), {"action": "escalate", "rule": "asked"}),
    ],
)
def test_what_the_server_does_while_it_withholds_a_reply_is_named(
    folder: Path, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    (folder / "policy.yaml").write_text(policy_text("\n".join(DEFERRED), names=("harm", "other")))
    code, output = run("test", folder / "policy.yaml", "--cases", write(folder, [({"scores": given}, expected)]))
    assert code == 0, output


def test_a_recorded_trace_may_stand_in_a_file_of_its_own(folder: Path) -> None:
    case, expected = CASES[2]
    (folder / "trace.json").write_text(json.dumps(case))
    code, output = run("test", folder / "policy.yaml", "--cases", write(folder, [({"trace": "trace.json"}, expected)]))
    assert code == 0, output


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"scores": {"harm": {"prompt": [0.0]}}}, "reads 'other', of which it has no scores"),
        ({"scores": {**scores([0.0]), "more": {"prompt": [0.0]}}}, "has no detector 'more'"),
        ({"scores": scores([0.0]), "policy": "strange"}, "the policy 'strange' is not known: default"),
        (
            {"scores": {"harm": {"prompt": [[0.0, 1.0]]}, "other": {"prompt": [0.0]}}},
            "gives 1 numbers for a token, not 2",
        ),
        ({"scores": {"harm": {"prompt": [0.0]}, "other": {"prompt": [0.0, 0.0]}}}, "different lengths"),
        ({"scores": scores([0.0]), "segments": [{"role": "user", "tokens": 2}]}, "'segments' have 2 tokens"),
        ({"trace": "nowhere.json"}, "cannot be read"),
        ({"trace": "a.json", "format": "raw"}, "leave one of them out"),
        ({}, "a case has 'scores' or a 'trace'"),
    ],
)
def test_cases_that_say_too_little_or_too_much_are_refused(folder: Path, case: dict[str, Any], said: str) -> None:
    with pytest.raises(CaseError, match=said):
        run("test", folder / "policy.yaml", "--cases", write(folder, [(case, {"action": "allow"})]))


def test_segments_say_what_a_rule_reads(folder: Path) -> None:
    rules = rule("tools", action="block", when="segments: [tool]")
    (folder / "policy.yaml").write_text(policy_text(rules, names=("harm", "other")))
    trial = Trial(check_policy(folder / "policy.yaml"))
    for roles, expected in ((("user", "tool"), "allow"), (("tool", "user"), "block")):
        trace = Trace.model_validate_json(
            json.dumps({"scores": scores([0, 9, 0, 0]), "segments": [{"role": role, "tokens": 2} for role in roles]})
        )
        case = Case.model_validate_json('{"name": "x", "trace": "x", "expect": {"action": "allow"}}')
        assert trial.run(case, trace).action.value == expected


@given(
    st.lists(st.sampled_from((0.0, 0.5, 9.0)), min_size=2, max_size=6),
    st.lists(st.sampled_from((0.0, 9.0)), max_size=6),
)
@settings(max_examples=40, deadline=None)
def test_what_is_found_is_what_the_rules_say(tmp_path_factory: Any, prompt: list[float], reply: list[float]) -> None:
    """The rules of this file by hand: the first prompt token above its threshold but the sink; else of the reply."""
    folder = tmp_path_factory.mktemp("found")
    for number, name in enumerate(("harm", "other")):
        stages = [calibration(stage) for stage in (Stage.PROMPT, Stage.STREAM)]
        saved_artifact(folder, make_card(name, calibrations=stages), number)
    (folder / "policy.yaml").write_text(policy_text("\n".join(RULES), names=("harm", "other")))
    (case,) = read_cases(write(folder, [({"scores": scores(prompt, reply)}, {"action": "allow"})])).cases
    found = Trial(check_policy(folder / "policy.yaml")).run(case, case.recorded(folder))
    if max(prompt[1:]) > 1:
        assert (found.rule, found.stage, found.at) == ("stop", Stage.PROMPT, len(prompt) - 1)
    elif reply and max(reply) > 1:
        assert (found.rule, found.stage, found.at) == ("cut", Stage.STREAM, len(prompt) + reply.index(9.0))
    else:
        assert (found.rule, found.stage, found.at, found.rules) == (None, None, None, ())


class TestDiff:
    def diff(self, folder: Path, new: str) -> list[str]:
        (folder / "new.yaml").write_text(new)
        code, output = run("diff", folder / "policy.yaml", folder / "new.yaml")
        assert code == 0, output
        return output.splitlines()

    def test_a_file_with_other_comments_changes_nothing(self, folder: Path) -> None:
        same = "# a comment\n" + (folder / "policy.yaml").read_text()
        assert self.diff(folder, same) == ["nothing that a request would notice"]

    def test_rules_thresholds_modes_and_policies_in_words(self, folder: Path) -> None:
        rules = (
            rule("stop", action="flag", when="above: {value: 3.5}"),
            RULES[2].replace("shadow", "enforce"),
            rule("more", detector="other", action="flag"),
        )
        policy = "on_gap: block\nexpose: scores"
        lines = self.diff(folder, policy_text("\n".join(rules), names=("harm", "other"), policy=policy))
        for line in (
            "~ policy default: on_gap: flag -> block",
            "~ policy default: expose: actions -> scores",
            "~ rule default/stop: does: block -> flag",
            "~ rule default/stop: harm at prompt in chat fires above: 1 -> 3.5",
            "~ rule default/watch: mode: shadow -> enforce",
        ):
            assert line in lines
        assert any(
            line.startswith("- rule default/cut: does: block; mode: enforce; if: harm (max at stream)")
            for line in lines
        )
        assert any(line.startswith("+ rule default/more: ") for line in lines)
        assert lines[-1] == "a server that was started with the old file can take this over while it runs"

    def test_detectors_and_what_needs_a_restart(self, folder: Path) -> None:
        saved_artifact(folder, make_card("far", layers=(2,), calibrations=[calibration()]), 3)
        text = policy_text(rule("r", detector="far"), names=("far",), head="reserve: {directions: 9}\n")
        lines = self.diff(folder, text)
        assert any(line.startswith("+ detector far: kind: linear; reads: resid_post.2; weights: ") for line in lines)
        assert any(line.startswith("- detector harm: ") for line in lines)
        assert "restart needed: reserve: it is fixed when the server starts" in lines
        assert "restart needed: detectors: resid_post.2 is read by far, and by none of the old file" in lines

    def test_tenants(self, folder: Path) -> None:
        key = "a" * 64
        lines = self.diff(
            folder,
            (folder / "policy.yaml").read_text() + f"tenants: [{{name: acme, key_sha256: {key}, policy: default}}]\n",
        )
        assert any(line.startswith("+ tenant acme: policy: default; ") for line in lines)
        assert not any(key in line for line in lines)


def test_a_server_that_does_not_answer_is_named() -> None:
    from serving.commands.policy_server import ServerError

    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9: does not answer"):
        run("history", "--server", "http://127.0.0.1:9")
