"""Recording and alert rules as data, and as Prometheus reads them. Knows no metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

RUNBOOKS = "docs/runbooks"


class Severity(StrEnum):
    """Who is woken."""

    CRITICAL = "critical"
    """Somebody, at once: the monitor may be blind, or is under attack."""
    WARNING = "warning"
    """Somebody, in working hours."""
    INFO = "info"
    """Nobody; it stands beside other things."""
    NONE = "none"
    """The dead man's switch: its absence is the alarm."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A series that is computed in advance.

    Attributes:
        name: ``level:metric:operation``.
        expression: PromQL.
    """

    name: str
    expression: str

    def rendered(self) -> dict[str, Any]:
        """As it stands in a rule file."""
        return {"record": self.name, "expr": _block(self.expression)}


@dataclass(frozen=True, slots=True)
class Alert:
    """A condition that somebody has to know of.

    Attributes:
        name: in CamelCase; also the name of its runbook.
        expression: PromQL; whatever it gives is an alarm.
        hold: how long it has to hold, as PromQL writes durations.
        severity: who is woken.
        summary: one line, may hold templates.
        description: what it means and what comes next, may hold templates.
        labels: more of them, for routing.
        runbook: its page; None where the alert is the user's own.
    """

    name: str
    expression: str
    hold: str
    severity: Severity
    summary: str
    description: str
    labels: dict[str, str] = field(default_factory=dict)
    runbook: str | None = None

    def rendered(self) -> dict[str, Any]:
        """As it stands in a rule file."""
        annotations = {"summary": self.summary, "description": self.description}
        if self.runbook is not None:
            annotations["runbook_url"] = self.runbook
        return {
            "alert": self.name,
            "expr": _block(self.expression),
            "for": self.hold,
            "labels": {"severity": self.severity.value, **self.labels},
            "annotations": annotations,
        }


@dataclass(frozen=True, slots=True)
class RuleGroup:
    """Rules that are evaluated one after the other, in this order."""

    name: str
    rules: Sequence[Recording | Alert]
    interval: str | None = None

    def rendered(self) -> dict[str, Any]:
        """As it stands in a rule file."""
        found: dict[str, Any] = {"name": self.name}
        if self.interval is not None:
            found["interval"] = self.interval
        return {**found, "rules": [rule.rendered() for rule in self.rules]}


def rule_file(groups: Sequence[RuleGroup], *, origin: str) -> str:
    """The text of a rule file.

    Args:
        groups: in order.
        origin: how the file is made; stands in its first line.
    """
    yaml = YAML()
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = StringIO()
    yaml.dump({"groups": [group.rendered() for group in groups]}, stream)
    return f"# {origin}\n{stream.getvalue()}"


def _block(expression: str) -> str:
    text = expression.strip()
    return LiteralScalarString(text) if "\n" in text else text
