"""Detectors: where their statistics lie, against their thresholds."""

from __future__ import annotations

from dashboards import recordings as recorded
from dashboards.panel import Board, Form, Panel, Row, Series, Unit
from monitor import catalogue

_OF = '{job=~"$job", detector=~"$detector"}'

DETECTORS = Board(
    uid="telltale-detectors",
    title="Telltale: detectors",
    description="Where the statistics of requests lie, how often they exceed a threshold, whether they drift.",
    by_detector=True,
    rows=(
        Row(
            "Statistics",
            (
                Panel(
                    "Median over an hour, and thresholds",
                    (
                        Series(f"{recorded.SCORE_MEDIAN}{_OF}", "{{detector}} at {{stage}}"),
                        Series(
                            f"max by (detector, stage, format) ({catalogue.DETECTOR_THRESHOLD.name}{_OF})",
                            "threshold: {{detector}} at {{stage}}, {{format}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "In the detector's own units. Where a threshold depends on length, the lowest.",
                    width=24,
                ),
                Panel(
                    "Statistics of requests",
                    (
                        Series(
                            f"sum by (le) (increase({catalogue.DETECTOR_SCORE.name}_bucket{_OF}[$__rate_interval]))",
                            "{{le}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "All chosen detectors together: choose one.",
                    Form.HEATMAP,
                    width=24,
                ),
            ),
        ),
        Row(
            "Exceedances",
            (
                Panel(
                    "Share of requests above the threshold",
                    (
                        Series(
                            f"sum by (detector, stage) (rate({catalogue.DETECTOR_FIRED.name}{_OF}[$__rate_interval]))\n"
                            f"/ sum by (detector, stage) (rate({catalogue.DETECTOR_SCORE.name}_count{_OF}"
                            "[$__rate_interval]))",
                            "{{detector}} at {{stage}}",
                        ),
                    ),
                    Unit.SHARE,
                    "Whether a rule rests on the detector or not.",
                ),
                Panel(
                    "Requests above the threshold",
                    (
                        Series(
                            f"sum by (detector, stage) (increase({catalogue.DETECTOR_FIRED.name}{_OF}"
                            "[$__rate_interval]))",
                            "{{detector}} at {{stage}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "In each interval of the graph.",
                ),
            ),
        ),
    ),
)
