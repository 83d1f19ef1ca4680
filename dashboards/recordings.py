"""Series that alerts and dashboards share, computed once."""

from __future__ import annotations

from dashboards.window import DAY, HOUR, MINUTE, Clock
from monitor import catalogue
from monitor.prometheus_rule import Recording, RuleGroup

REQUESTS = "telltale:requests:rate5m"
BLOCKED = "telltale:blocked:ratio_rate15m"
SCORED = "telltale:tokens_scored:rate5m"
COVERAGE = "telltale:coverage:ratio_rate5m"
OBSERVE_P99 = "telltale:observe_seconds:p99_rate5m"
FIRED_SHORT = "telltale:rule_fired:ratio_rate5m"
FIRED_LONG = "telltale:rule_fired:ratio_rate1h"
FIRED_SLOW_SHORT = "telltale:rule_fired:ratio_rate30m"
FIRED_SLOW_LONG = "telltale:rule_fired:ratio_rate6h"
SCORE_MEDIAN = "telltale:detector_score:p50_rate1h"
STATISTIC = ", ".join(catalogue.DETECTOR_SCORE.labels)
"""The labels that tell one statistic from another."""


def fired_ratio(window: str) -> str:
    """The share of requests for which a rule fired, shadow or not."""
    fired = f"sum by (job, rule) (rate({catalogue.ACTIONS.name}[{window}]))"
    return f"{fired}\n/ on (job) group_left ()\nsum by (job) (rate({catalogue.REQUESTS.name}[{window}]))"


def score_quantile(quantile: float, window: str, offset: str = "") -> str:
    """A quantile of a detector's statistic over requests.

    Args:
        quantile: 0 to 1.
        window: over which.
        offset: how long ago the window ended, e.g. ``offset 1h``.
    """
    # By all labels of the statistic: the buckets of another one are cut elsewhere.
    buckets = f"rate({catalogue.DETECTOR_SCORE.name}_bucket[{window}]{' ' + offset if offset else ''})"
    return f"histogram_quantile({quantile}, sum by (job, {STATISTIC}, le) ({buckets}))"


def recordings(clock: Clock) -> RuleGroup:
    """The recording rules."""
    blocked = f'sum by (job) (rate({catalogue.REQUESTS.name}{{action="block"}}[{clock(15 * MINUTE)}]))'
    requests = f"sum by (job) (rate({catalogue.REQUESTS.name}[{clock(15 * MINUTE)}]))"
    scored = f"sum by (job) (rate({catalogue.TOKENS_SCORED.name}[{clock(5 * MINUTE)}]))"
    gaps = f"sum by (job) (rate({catalogue.GAPS.name}[{clock(5 * MINUTE)}]))"
    observed = f"sum by (job, le) (rate({catalogue.OBSERVE_SECONDS.name}_bucket[{clock(5 * MINUTE)}]))"
    return RuleGroup(
        "telltale-recordings",
        (
            Recording(REQUESTS, f"sum by (job, action) (rate({catalogue.REQUESTS.name}[{clock(5 * MINUTE)}]))"),
            Recording(BLOCKED, f"{blocked}\n/\n{requests}"),
            Recording(SCORED, scored),
            Recording(COVERAGE, f"{scored}\n/\n({scored} + {gaps})"),
            Recording(OBSERVE_P99, f"histogram_quantile(0.99, {observed})"),
            Recording(FIRED_SHORT, fired_ratio(clock(5 * MINUTE))),
            Recording(FIRED_SLOW_SHORT, fired_ratio(clock(30 * MINUTE))),
            Recording(FIRED_LONG, fired_ratio(clock(HOUR))),
            Recording(FIRED_SLOW_LONG, fired_ratio(clock(6 * HOUR))),
            Recording(SCORE_MEDIAN, score_quantile(0.5, clock(HOUR))),
        ),
        # The rules of a rehearsal are evaluated as often as they are shorter.
        interval=None if clock.factor == 1.0 else "1s",
    )


HISTORY = DAY
"""What "as before" means where an alert compares with the past, in seconds."""
