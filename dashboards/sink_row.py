"""What becomes of the messages to sinks: a row of the overhead board."""

from __future__ import annotations

from dashboards.panel import Panel, Row, Series, Unit
from monitor import catalogue

_JOB = '{job=~"$job"}'


def _rate(metric: catalogue.Metric, labels: str = "sink") -> str:
    return f"sum by ({labels}) (rate({metric.name}{_JOB}[$__rate_interval]))"


SINKS = Row(
    "Sinks",
    (
        Panel(
            "Messages",
            (
                Series(_rate(catalogue.SINK_DELIVERED), "{{sink}} took"),
                Series(_rate(catalogue.SINK_FAILED, "sink, reason"), "{{sink}}: {{reason}}"),
            ),
            Unit.NUMBER,
            "A second: delivered, and attempts that failed.",
        ),
        Panel(
            "Not delivered",
            (
                Series(f"sum by (sink) ({catalogue.SINK_QUEUE.name}{_JOB})", "{{sink}}: waiting"),
                Series(
                    f"sum by (sink) (increase({catalogue.SINK_DEAD_LETTERS.name}{_JOB}[$__rate_interval]))",
                    "{{sink}}: dead letters",
                ),
                Series(
                    f"sum by (sink) (increase({catalogue.SINK_DROPPED.name}{_JOB}[$__rate_interval]))",
                    "{{sink}}: dropped",
                ),
            ),
            Unit.NUMBER,
            "Dead letters are sent again by telltale sinks replay; what was dropped is gone.",
        ),
        Panel(
            "A message is delivered after",
            (
                Series(
                    "histogram_quantile(0.95, sum by (le, sink) "
                    f"(rate({catalogue.SINK_SECONDS.name}_bucket{_JOB}[$__rate_interval])))",
                    "{{sink}}, 95%",
                ),
            ),
            Unit.SECONDS,
            "From the event on, with all attempts.",
        ),
    ),
)
