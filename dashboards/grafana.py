"""Dashboards as Grafana reads them. The only file that knows its SDK, which is needed to generate, not to serve."""

from __future__ import annotations

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.panel import Board, Form, Panel
from monitor import catalogue

_HEIGHT = 8
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_GREEN, _RED = "green", "red"

AnyPanel = timeseries.Panel | stat.Panel | heatmap.Panel


def grafana_json(board: Board) -> str:
    """The dashboard's JSON, as Grafana 11.6 and later import it; ends with a line break."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["telltale", "generated"])
        .timezone("browser")
        .refresh("30s")
        .time("now-6h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_label_variable("job", f"label_values({catalogue.READY.name}, job)"))
    )
    if board.by_detector:
        source = f'label_values({catalogue.DETECTOR_SCORE.name}_count{{job=~"$job"}}, detector)'
        made = made.with_variable(_label_variable("detector", source))
    if board.by_tenant:
        source = f'label_values({catalogue.TENANT_REQUESTS.name}{{job=~"$job"}}, tenant)'
        made = made.with_variable(_label_variable("tenant", source).multi(False).include_all(False))
    for row in board.rows:
        made = _with_row(made, row.title, row.panels)
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _label_variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def _with_row(made: Dashboard, title: str, panels: tuple[Panel, ...]) -> Dashboard:
    made = made.with_row(dashboard.Row(title))
    for panel in panels:
        made = made.with_panel(_panel(panel))
    return made


def _panel(panel: Panel) -> AnyPanel:
    made: AnyPanel
    match panel.form:
        case Form.LINES:
            made = (
                timeseries.Panel()
                .fill_opacity(8)
                .line_width(1.5)
                .legend(
                    common.VizLegendOptions()
                    .display_mode(LegendDisplayMode.LIST)
                    .placement(LegendPlacement.BOTTOM)
                    .show_legend(True)
                )
                .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
            )
        case Form.NUMBER:
            made = stat.Panel().graph_mode(BigValueGraphMode.AREA)
            made = made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        case Form.HEATMAP:
            made = heatmap.Panel().calculate(False)
    made = made.title(panel.title).description(panel.description).unit(panel.unit.value).datasource(_SOURCE)
    made = made.height(_HEIGHT).span(panel.width)
    if thresholds := _thresholds(panel):
        made = made.thresholds(thresholds)
    for number, series in enumerate(panel.series):
        query = prometheus.Dataquery().expr(series.expression).ref_id(chr(ord("A") + number))
        query = query.legend_format(series.legend) if series.legend else query
        if panel.form is Form.HEATMAP:
            query = query.format(PromQueryFormat.HEATMAP)
        made = made.with_target(query)
    return made


def _thresholds(panel: Panel) -> dashboard.ThresholdsConfig | None:
    steps: list[Threshold] = []
    if panel.alarm_below is not None:
        steps = [Threshold(color=_RED, value=None), Threshold(color=_GREEN, value=panel.alarm_below)]
    elif panel.alarm_above is not None:
        steps = [Threshold(color=_GREEN, value=None), Threshold(color=_RED, value=panel.alarm_above)]
    if not steps:
        return None
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
