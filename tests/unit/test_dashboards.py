"""Dashboards and rules hold together with the catalogue, with each other and with what is committed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dashboards.__main__ import main
from dashboards.alerts import alert_groups
from dashboards.boards import BOARDS
from dashboards.generated_files import generated_files, prometheus_rules
from dashboards.recordings import recordings
from dashboards.window import DAY, HOUR, MINUTE, Clock
from monitor.catalogue import CATALOGUE
from monitor.flag_rules import RUNBOOK
from monitor.prometheus_rule import Alert, Severity

ROOT = Path(__file__).parents[2]
ALERTS = [rule for group in alert_groups(Clock()) for rule in group.rules if isinstance(rule, Alert)]
RECORDED = {rule.name: rule for rule in recordings(Clock()).rules}
EXPRESSIONS = {
    **{alert.name: alert.expression for alert in ALERTS},
    **{name: rule.expression for name, rule in RECORDED.items() if not isinstance(rule, Alert)},
    **{f"{board.uid} {number}": text for board in BOARDS for number, text in enumerate(board.expressions())},
}


def series_of(expression: str) -> set[str]:
    """The series of ours that an expression reads, without what histograms add to their names."""
    found = set(re.findall(r"\btelltale[:_][a-z0-9_:]+", expression))
    names = {metric.name for metric in CATALOGUE}
    return {name if name in names else re.sub(r"_(bucket|count|sum)$", "", name) for name in found}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_query_reads_series_that_exist(name: str) -> None:
    known = {metric.name for metric in CATALOGUE} | set(RECORDED)
    assert series_of(EXPRESSIONS[name]) <= known


def test_every_metric_is_watched_or_shown() -> None:
    read = {name for expression in EXPRESSIONS.values() for name in series_of(expression)}
    assert {metric.name for metric in CATALOGUE} - read == {
        "telltale_tokens_skipped_total",
        "telltale_canary_failures_total",
    }


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_every_alert_has_its_runbook(alert: Alert) -> None:
    assert alert.runbook == f"docs/runbooks/{alert.name}.md"
    text = (ROOT / alert.runbook).read_text()
    assert text.startswith(f"# {alert.name}\n")
    assert "\n## Look\n" in text
    assert "\n## Do\n" in text
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / alert.runbook).parent.joinpath(link).is_file(), link


def test_no_runbook_is_left_over() -> None:
    expected = {alert.name for alert in ALERTS} | {RUNBOOK}
    assert {path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")} == expected


def test_only_the_watchdog_wakes_nobody() -> None:
    assert [alert.name for alert in ALERTS if alert.severity is Severity.NONE] == ["TelltaleWatchdog"]


def test_what_is_committed_is_what_would_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err
    folder = ROOT / "dashboards" / "generated"
    there = {str(path.relative_to(ROOT)) for path in folder.rglob("*") if path.is_file()}
    assert there == {name for name in generated_files() if name.startswith("dashboards/")}


def test_an_old_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    (tmp_path / "dashboards" / "generated" / "prometheus" / "telltale.rules.yaml").write_text("groups: []\n")
    assert main(["--check", "--out", str(tmp_path)]) == 1
    assert "telltale.rules.yaml is not what the catalogue gives. Run: make dashboards" in capsys.readouterr().err


def test_dashboards_name_no_data_source_and_keep_their_addresses() -> None:
    for board in BOARDS:
        made = json.loads(generated_files()[f"dashboards/generated/grafana/{board.uid}.json"])
        assert made["uid"] == board.uid
        assert made.get("id") is None
        sources = {panel["datasource"]["uid"] for panel in made["panels"] if "datasource" in panel}
        assert sources == {"${datasource}"}


@pytest.mark.parametrize(
    ("seconds", "plain", "shortened"),
    [
        (0, "0s", "0s"),
        (MINUTE, "1m", "1s"),
        (15 * MINUTE, "15m", "15s"),
        (HOUR, "1h", "1m"),
        (DAY, "1d", "24m"),
        (10, "10s", "1s"),
    ],
)
def test_durations(seconds: int, plain: str, shortened: str) -> None:
    assert Clock()(seconds) == plain
    assert Clock(1 / 60)(seconds) == shortened


def test_the_rehearsals_rules_are_the_shipped_ones_with_shorter_times() -> None:
    def shape(text: str) -> str:
        text = re.sub(r"^ *interval: 1s\n", "", text, flags=re.MULTILINE)
        return re.sub(r"\b\d+[smhd]\b|> [0-9.]+$", "T", text, flags=re.MULTILINE)

    assert shape(prometheus_rules(Clock(1 / 60))) == shape(prometheus_rules(Clock()))
