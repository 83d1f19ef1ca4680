"""What a dashboard shows, as data: panels in rows, each with its queries. Knows no Grafana."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Unit(StrEnum):
    """Units as Grafana names them."""

    NUMBER = "short"
    PER_SECOND = "reqps"
    SHARE = "percentunit"
    SECONDS = "s"
    YES_NO = "bool_yes_no"


class Form(StrEnum):
    """How numbers are drawn."""

    LINES = "timeseries"
    NUMBER = "stat"
    HEATMAP = "heatmap"


@dataclass(frozen=True, slots=True)
class Series:
    """A query and how its lines are called.

    Attributes:
        expression: PromQL; ``$job``, ``$detector`` and ``$tenant`` are the dashboard's variables.
        legend: with labels in double braces.
    """

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: what the numbers are.
        series: the queries.
        unit: of the numbers.
        form: how they are drawn.
        description: what to make of them.
        width: of 24 columns.
        alarm_above: a number is red from here on; None: it has no alarm.
        alarm_below: a number is red below; None: it has none.
    """

    title: str
    series: tuple[Series, ...]
    unit: Unit
    description: str
    form: Form = Form.LINES
    width: int = 12
    alarm_above: float | None = None
    alarm_below: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels side by side under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard.

    Attributes:
        uid: stays for ever: links and bookmarks point to it.
        title: shown on top.
        description: what it is for.
        rows: from top to bottom.
        by_detector: whether one can choose detectors.
        by_tenant: whether one chooses a tenant.
    """

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    by_detector: bool = False
    by_tenant: bool = False

    def expressions(self) -> Iterator[str]:
        """Every query."""
        for row in self.rows:
            for panel in row.panels:
                for series in panel.series:
                    yield series.expression
