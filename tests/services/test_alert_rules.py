"""The shipped rules by Prometheus's own tool: they are valid, and each failure raises the alert meant and no other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from dashboards.alerts import alert_groups
from dashboards.generated_files import prometheus_rules
from dashboards.window import Clock
from serving.cli import app
from tests.support.rule_scenarios import MINUTES, SCENARIOS, Scenario

pytestmark = pytest.mark.services

ALERTS = {alert.name for group in alert_groups(Clock()) for alert in group.rules}
WATCHDOG = "TelltaleWatchdog"


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "telltale.rules.yaml"
    path.write_text(prometheus_rules(Clock()))
    return path


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    assert program is not None, "promtool is missing: run `make services`"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def test_prometheus_reads_them(rules: Path) -> None:
    checked = promtool("check", "rules", str(rules))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def fired(rules: Path, folder: Path, scenario: Scenario) -> set[str]:
    """The alerts that promtool sees in a scenario: it is told to expect none, and names those that it got."""
    asked = [{"eval_time": f"{MINUTES}m", "alertname": name, "exp_alerts": []} for name in sorted(ALERTS)]
    series = [{"series": name, "values": text} for name, text in scenario.series().items()]
    test = {"interval": "1m", "input_series": series, "alert_rule_test": asked}
    questions = folder / "test.yaml"
    with questions.open("w") as stream:
        YAML().dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]}, stream)
    answer = promtool("test", "rules", str(questions))
    said = answer.stdout + answer.stderr
    found = set(re.findall(r"alertname: ?(\w+)", said))
    assert (answer.returncode != 0) == bool(found), said
    return found


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_each_failure_raises_its_alert_and_no_other(scenario: Scenario, rules: Path, tmp_path: Path) -> None:
    assert fired(rules, tmp_path, scenario) == {WATCHDOG, *scenario.alerts}


FLAGGED = """\
version: "1"
detectors:
  - {pack: "builtin:smollm2-135m-instruct", alert: {severity: info, rate: 2/h}}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: block
    rules:
      - name: stop
        when: {detector: harmful_request, stage: prompt}
        do: {action: block}
        mode: enforce
        alert: {severity: critical, count: 3, within: 10m, for: 2m}
"""
COUNTED = 'telltale_actions_total{job="telltale", instance="a", action="block", mode="enforce", '


@pytest.mark.parametrize(
    ("series", "of_rule", "of_detectors"),
    [
        ({COUNTED + 'rule="stop", policy="default"}': "0x30 2x10"}, 0, set()),
        ({COUNTED + 'rule="stop", policy="default"}': "0x30 3x10"}, 1, set()),
        # In two counters of one server, or in two servers: they are added up.
        ({COUNTED + 'rule="stop", policy="default"}': "0x30 2x10",
          COUNTED + 'rule="default/stop", policy="strictest"}': "0x30 1x10"}, 1, set()),
        ({COUNTED + 'rule="stop", policy="default"}': "0x30 2x10",
          COUNTED + 'rule="stop", policy="default@acme"}': "0x30 1x10"}, 1, set()),
        # Another rule, and the same one of another policy.
        ({COUNTED + 'rule="stopped", policy="default"}': "0x30 9x10",
          COUNTED + 'rule="stop", policy="default2"}': "0x30 9x10",
          COUNTED + 'rule="default2/stop", policy="strictest"}': "0x30 9x10"}, 0, set()),
        # Three within ten minutes, but for one minute alone.
        ({COUNTED + 'rule="stop", policy="default"}': "0x39 3x1"}, 0, set()),
        ({'telltale_flagged_requests_total{job="telltale", detector="pii"}': "0x30 2x10",
          'telltale_flagged_requests_total{job="telltale", detector="code"}': "0x30 3x10"}, 0, {"code"}),
    ],
)  # fmt: skip
def test_alerts_of_a_policy_file(series: dict[str, str], of_rule: int, of_detectors: set[str], tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(FLAGGED)
    made = CliRunner().invoke(app, ["alerts", "render", str(tmp_path / "policy.yaml"), "--out", str(tmp_path)])
    assert made.exit_code == 0, made.output
    path = tmp_path / "telltale.flagged.rules.yaml"
    checked = promtool("check", "rules", str(path))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    names = ("TelltaleRuleFlagged", "TelltaleDetectorFlagged")
    asked = [{"eval_time": "40m", "alertname": name, "exp_alerts": []} for name in names]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": text} for name, text in series.items()],
        "alert_rule_test": asked,
    }
    with (tmp_path / "test.yaml").open("w") as stream:
        YAML().dump({"rule_files": [str(path)], "evaluation_interval": "1m", "tests": [test]}, stream)
    answer = promtool("test", "rules", str(tmp_path / "test.yaml"))
    said = answer.stdout + answer.stderr
    assert len(re.findall(r'alertname="TelltaleRuleFlagged"', said)) == of_rule, said
    assert set(re.findall(r'alertname="TelltaleDetectorFlagged", detector="(\w+)"', said)) == of_detectors, said


def test_every_alert_has_a_scenario() -> None:
    assert {name for scenario in SCENARIOS for name in scenario.alerts} == ALERTS - {WATCHDOG}
