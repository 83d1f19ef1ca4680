"""docs/policy.md: its examples pass ``telltale check``, and every key of the schema stands there."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import indent

import pytest
from typer.testing import CliRunner

from monitor.access import Access, ApiKey
from monitor.alert_entry import AlertEntry
from monitor.config import CanarySettings, Config, DetectorEntry, Policy, Reserve, SteerEntry
from monitor.destination import Destination
from monitor.explain import ExplainSettings
from monitor.probing import ProbingSettings
from monitor.rule import Do, Rollout, Rule
from monitor.sessions.settings import SessionSettings
from monitor.tenants import Tenant
from monitor.when import CONDITION_KEYS, CONDITION_MODELS, Above, Limit, Weighed
from serving.cli import app

TEXT = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
FILES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
RULES = re.findall(r"```yaml rule\n(.*?)```", TEXT, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
HEAD = """\
version: "1"
detectors:
  - pack: builtin:smollm2-135m-instruct
policies:
  - name: default
    on_gap: block
    on_uncalibrated: block
    rules:
"""
MODELS = (
    *(Config, CanarySettings, ExplainSettings, DetectorEntry, Policy, Reserve, SteerEntry, Rule, Do, Rollout, Tenant),
    *(Access, AlertEntry, ApiKey, SessionSettings, ProbingSettings),
    *(Above, Limit, Weighed, *CONDITION_MODELS, Destination),
)


def as_file(rule: str) -> str:
    return HEAD + "      - " + indent(rule, "        ").lstrip()


@pytest.mark.parametrize("text", FILES + [as_file(rule) for rule in RULES])
def test_every_example_passes_check(tmp_path: Path, text: str) -> None:
    path = tmp_path / "telltale.yaml"
    path.write_text(text)
    result = CliRunner().invoke(app, ["check", str(path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for name in re.findall(r"name: ([a-z-]+)\n *when:", text):
        assert re.search(
            rf"^{name} (blocks|flags|would|steers|regenerates|escalates|routes)", result.output, re.MULTILINE
        )


def test_there_is_an_example_of_every_way_to_join() -> None:
    for key in (
        "all:",
        "any:",
        "not:",
        "weigh:",
        "rollout:",
        "scope:",
        "segments:",
        "by_model:",
        "by_header:",
        "judge:",
        "upstream:",
        "access:",
        "accumulate:",
    ):
        assert any(key in text for text in FILES + RULES), key


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_is_explained(model: type) -> None:
    keys = {field.alias or name for name, field in model.model_fields.items()}  # type: ignore[attr-defined]
    said = {word for quoted in re.findall(r"`([^`]+)`", PROSE) for word in re.findall(r"[a-z_0-9]+", quoted)}
    assert keys <= said


def test_every_way_to_join_is_explained() -> None:
    assert set(CONDITION_KEYS) <= set(re.findall(r"`([a-z]+)`", PROSE))
