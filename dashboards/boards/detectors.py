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
            "Against the calibration",
            (
                Panel(
                    "Population stability index",
                    (
                        Series(
                            f"max by (detector, stage, format) ({catalogue.SCORE_PSI.name}{_OF})",
                            "{{detector}} at {{stage}}, {{format}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "Of the newest 500 requests. Below 0.1 they are as in calibration, above 0.25 they are not.",
                    width=8,
                    alarm_above=0.25,
                ),
                Panel(
                    "Kolmogorov-Smirnov distance",
                    (
                        Series(
                            f"max by (detector, stage, format) ({catalogue.SCORE_KS.name}{_OF})",
                            "{{detector}} at {{stage}}, {{format}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "The largest difference of the two distribution functions, 0 to 1.",
                    width=8,
                ),
                Panel(
                    "Familiar traffic",
                    (Series(f"min by (detector) ({catalogue.FAMILIAR.name}{_OF})", "{{detector}}"),),
                    Unit.SHARE,
                    "Requests that a novelty detector did not find unusual: inside of what it was fitted on.",
                    width=8,
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
                    "Tokens until it is seen",
                    (
                        Series(
                            "histogram_quantile(0.5, sum by (detector, le) "
                            f"(increase({catalogue.DETECTION_DELAY.name}_bucket{_OF}[$__rate_interval])))",
                            "{{detector}}, half of them",
                        ),
                    ),
                    Unit.NUMBER,
                    "Of replies, up to the token at which a statistic first exceeds its threshold.",
                ),
                Panel(
                    "Requests by detector",
                    (
                        Series(
                            f"sum by (detector) (increase({catalogue.FLAGGED.name}{_OF}[$__rate_interval]))",
                            "{{detector}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "Above any threshold, once each.",
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
