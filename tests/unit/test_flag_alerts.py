"""``alert`` in a policy file: what it may say, what becomes of it, and that it changes nothing that is decided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML
from typer.testing import CliRunner

from monitor.alert_entry import AlertEntry
from monitor.flag_alert import Watched
from monitor.policy import Plan
from monitor.yaml_file import PolicyError
from probes.artifact import Artifact
from serving.cli import app
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, rule, saved_artifact

WARNING = "alert: {severity: warning, rate: 5/h}"
COUNT = "alert: {severity: critical, count: 3, within: 10m, for: 2m}"


def entry(text: str) -> AlertEntry:
    return AlertEntry.model_validate_json(json.dumps(YAML(typ="safe").load(text)["alert"]))


def with_alert(name: str, alert: str = "", **settings: str) -> str:
    return rule(name, **settings).removesuffix("}") + (f", {alert}}}" if alert else "}")


def plan(folder: Path, *rules: str, detector: str = "", calibrated: bool = True) -> Plan:
    cards = {
        "harm": make_card(calibrations=[calibration()]),
        "other": make_card("other", calibrations=[calibration()] if calibrated else []),
    }
    text = policy_text("\n".join(rules), names=list(cards))
    text = text.replace(
        "{artifact: other.safetensors}", f"{{artifact: other.safetensors{detector and ', '}{detector}}}"
    )
    return plan_of(folder, text, {name: saved_artifact(folder, card) for name, card in cards.items()})


@pytest.mark.parametrize(
    ("text", "words", "condition", "window"),
    [
        (WARNING, "warning alert above 5/h", "> 5", "1h"),
        ("alert: {severity: info, rate: 30/m, notify: ops}", "info alert above 30/m; tells ops", "> 30", "1m"),
        (COUNT, "critical alert from 3 requests within 10m on, for 2m", ">= 3", "10m"),
    ],
)
def test_what_an_alert_says(text: str, words: str, condition: str, window: str) -> None:
    found = entry(text)
    assert (found.in_words(), found.condition, found.window) == (words, condition, window)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"severity": "warning"}, "exactly one of 'rate'"),
        ({"severity": "warning", "rate": "5/h", "count": 3, "within": "1h"}, "exactly one of 'rate'"),
        ({"severity": "warning", "count": 3}, "stand together"),
        ({"severity": "warning", "rate": "5/h", "within": "1h"}, "stand together"),
        ({"severity": "warning", "count": 3, "within": "0s"}, "longer than nothing"),
        ({"severity": "none", "rate": "5/h"}, "severity"),
        ({"rate": "5/h"}, "severity"),
        ({"severity": "warning", "rate": "5 per hour"}, "rate"),
        ({"severity": "warning", "rate": "0/h"}, "rate"),
        ({"severity": "warning", "count": 0, "within": "1h"}, "count"),
        ({"severity": "warning", "rate": "5/h", "for": "soon"}, "for"),
        ({"severity": "warning", "rate": "5/h", "hold": "5m"}, "hold"),
    ],
)
def test_what_no_alert_may_say(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AlertEntry.model_validate_json(json.dumps(fields))
    assert words in str(caught.value)


def test_rules_and_detectors_have_alerts(tmp_path: Path) -> None:
    found = plan(tmp_path, with_alert("stop", WARNING), with_alert("quiet"), detector=COUNT).alerts
    assert [(alert.watched, alert.names, alert.policy) for alert in found] == [
        (Watched.DETECTOR, ("other",), ""),
        (Watched.RULE, ("stop",), "default"),
    ]


def test_an_alert_decides_nothing(tmp_path: Path) -> None:
    """Whoever adds one does not run another policy: no server restarts for it, no TelltalePolicyChanged."""
    plain, told = plan(tmp_path, with_alert("stop")), plan(tmp_path, with_alert("stop", WARNING), detector=COUNT)
    assert plain.digest == told.digest
    assert plain.digest != plan(tmp_path, with_alert("stop", action="flag")).digest


def test_an_alert_that_can_never_fire_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"detectors\[1\].alert: can never fire: no rule compares 'other'"):
        plan(tmp_path, with_alert("stop"), detector=COUNT, calibrated=False)
    judged = with_alert("odd", detector="other", when="aggregate: {kind: max}, above: {value: 3}", mode="shadow")
    assert plan(tmp_path, with_alert("stop"), judged, detector=COUNT, calibrated=False).alerts


def test_a_sink_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    words = r"policies\[0\].rules\[0\].alert.notify: is 'ops'"
    with pytest.raises(PolicyError, match=words):
        plan(tmp_path, with_alert("stop", "alert: {severity: warning, rate: 5/h, notify: ops}"))


def render(folder: Path, text: str, *options: str) -> tuple[int, str]:
    (folder / "telltale.yaml").write_text(text)
    result = CliRunner().invoke(app, ["alerts", "render", str(folder / "telltale.yaml"), *options])
    return result.exit_code, result.stdout


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return saved_artifact(tmp_path, make_card(calibrations=[calibration()]))


def test_the_rules_are_written(tmp_path: Path, artifact: Artifact) -> None:
    text = policy_text(with_alert("stop", COUNT)).replace("harm.safetensors}", f"harm.safetensors, {WARNING}}}")
    code, printed = render(tmp_path, text)
    assert code == 0
    group = YAML(typ="safe").load(printed)["groups"][0]
    detector, stop = group["rules"]
    assert detector["alert"] == "TelltaleDetectorFlagged"
    assert detector["expr"] == (
        'round(sum by (job, detector) (increase(telltale_flagged_requests_total{detector=~"harm"}[1h]))) > 5'
    )
    assert stop["labels"] == {"severity": "critical", "rule": "stop", "policy": "default"}
    assert stop["for"] == "2m"
    assert stop["expr"].endswith("[10m]))) >= 3")
    assert stop["annotations"]["runbook_url"] == "docs/runbooks/TelltaleFlagged.md"
    assert render(tmp_path, text, "--out", str(tmp_path / "rules"))[0] == 0
    assert (tmp_path / "rules" / "telltale.flagged.rules.yaml").read_text() == printed


def test_a_file_without_alerts_has_nothing_to_render(tmp_path: Path, artifact: Artifact) -> None:
    assert render(tmp_path, policy_text(rule("stop"))) == (1, "")


def test_check_says_alerts_in_words(tmp_path: Path, artifact: Artifact) -> None:
    path = tmp_path / "telltale.yaml"
    path.write_text(policy_text(with_alert("stop", COUNT)))
    said = CliRunner().invoke(app, ["check", str(path)], env={"COLUMNS": "200"}).output
    assert "alert: rule stop of policy default: critical alert from 3 requests within 10m on, for 2m" in said
    assert "drift cannot be told of harm" in said


def test_an_alert_of_a_pack_is_for_each_of_its_detectors(tmp_path: Path) -> None:
    head = f'version: "1"\ndetectors:\n  - {{pack: "builtin:smollm2-135m-instruct", {WARNING}}}\npolicies:\n'
    body = "  - name: default\n    on_gap: block\n    on_uncalibrated: block\n    rules:\n      - "
    code, printed = render(tmp_path, head + body + rule("stop", detector="harmful_request") + "\n")
    assert code == 0
    assert "harmful_request" in printed
    assert "toxicity" in printed
