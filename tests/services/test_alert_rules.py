"""The shipped rules by Prometheus's own tool: they are valid, and each failure raises the alert meant and no other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dashboards.alerts import alert_groups
from dashboards.generated_files import prometheus_rules
from dashboards.window import Clock
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


def test_every_alert_has_a_scenario() -> None:
    assert {name for scenario in SCENARIOS for name in scenario.alerts} == ALERTS - {WATCHDOG}
