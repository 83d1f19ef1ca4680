"""Hours of a healthy server as series for promtool, and what is changed in them for each failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MINUTES = 8 * 60
OF = 'job="telltale", instance="a"'


def steady(per_minute: float) -> str:
    """A counter that rises evenly, in promtool's notation."""
    return f"0+{per_minute:g}x{MINUTES}"


def changed(before: float, after: float, *, minutes: int) -> str:
    """A counter that rises at another rate in its last minutes."""
    until = MINUTES - minutes
    return f"0+{before:g}x{until} {before * until + after:g}+{after:g}x{minutes}"


def value(number: float) -> str:
    """A gauge that stays."""
    return f"{number:g}x{MINUTES}"


def becomes(before: str, after: str, *, minutes: int) -> str:
    """A gauge with another value in its last minutes; ``_`` is none."""
    return f"{before}x{MINUTES - minutes} {after}x{minutes}"


def scores(middle: float, *, before: float | None = None, minutes: int = 0) -> dict[str, str]:
    """Cumulative buckets of a detector's statistic, evenly spread over 2 around a middle: 60 requests a minute.

    Args:
        middle: of the last minutes, or throughout.
        before: of the time before.
        minutes: how long the middle has been this one.
    """
    found = {}
    for bound in (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0):
        rates = [60 * min(1.0, max(0.0, (bound - (where - 1)) / 2)) for where in (before, middle) if where is not None]
        series = f'telltale_detector_score_bucket{{{OF}, detector="d", stage="prompt", le="{bound:g}"}}'
        found[series] = steady(rates[0]) if len(rates) == 1 else changed(*rates, minutes=minutes)
    found[f'telltale_detector_score_bucket{{{OF}, detector="d", stage="prompt", le="+Inf"}}'] = steady(60)
    found[f'telltale_detector_score_count{{{OF}, detector="d", stage="prompt"}}'] = steady(60)
    return found


def step_times(seconds: float, *, before: float, minutes: int) -> dict[str, str]:
    """Buckets of how long steps wait for the monitor."""
    found = {}
    for bound in (0.0001, 0.001, 0.01, 0.05):
        rates = [600.0 * (where <= bound) for where in (before, seconds)]
        found[f'telltale_observe_seconds_bucket{{{OF}, le="{bound:g}"}}'] = changed(*rates, minutes=minutes)
    found[f'telltale_observe_seconds_bucket{{{OF}, le="+Inf"}}'] = steady(600)
    return found


def store_times(seconds: float, *, minutes: int) -> dict[str, str]:
    """Buckets of how long events take to be stored: 2 ms, and in the last minutes something else."""
    found = {}
    for bound in (0.005, 0.1, 1.0, 10.0):
        rates = [60.0 * (where <= bound) for where in (0.002, seconds)]
        found[f'telltale_audit_seconds_bucket{{{OF}, le="{bound:g}"}}'] = changed(*rates, minutes=minutes)
    found[f'telltale_audit_seconds_bucket{{{OF}, le="+Inf"}}'] = steady(60)
    return found


HEALTHY: Mapping[str, str] = {
    f"telltale_ready{{{OF}}}": value(1),
    f"telltale_canary_ok{{{OF}}}": value(1),
    f"telltale_canary_last_success_timestamp_seconds{{{OF}}}": steady(60),
    f'telltale_policy_info{{{OF}, digest="one"}}': value(1),
    'telltale_policy_info{job="telltale", instance="b", digest="one"}': value(1),
    f'telltale_requests_total{{{OF}, action="allow"}}': steady(59.5),
    f'telltale_requests_total{{{OF}, action="block"}}': steady(0.5),
    f'telltale_actions_total{{{OF}, rule="refuse", action="block", mode="enforce"}}': steady(0.5),
    f'telltale_rule_target_fpr{{{OF}, rule="refuse", format="chat"}}': value(0.01),
    f"telltale_tokens_scored_total{{{OF}}}": steady(6000),
    f'telltale_gaps_total{{{OF}, reason="not_finite"}}': value(0),
    f'telltale_gaps_total{{{OF}, reason="canary"}}': value(0),
    f"telltale_unsigned_requests_total{{{OF}}}": value(0),
    f'vllm:generation_tokens_total{{{OF}, model_name="m"}}': steady(3000),
    f'telltale_alarm_rate_exceeded_total{{{OF}, rule="refuse", format="chat", policy="default"}}': value(0),
    f"telltale_audit_errors_total{{{OF}}}": value(0),
    f"telltale_audit_dropped_total{{{OF}}}": value(0),
    **scores(0.0),
    **step_times(0.00005, before=0.00005, minutes=60),
    **store_times(0.002, minutes=60),
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A failure, and the alerts that it must raise: these and no others.

    Attributes:
        name: of the test.
        alerts: beside the watchdog.
        changes: series that are not as in health; None takes one away.
    """

    name: str
    alerts: frozenset[str]
    changes: Mapping[str, str | None] = field(default_factory=dict)

    def series(self) -> dict[str, str]:
        """What promtool is given."""
        merged = {**HEALTHY, **self.changes}
        return {name: values for name, values in merged.items() if values is not None}


def _one(alert: str, changes: Mapping[str, str | None]) -> Scenario:
    return Scenario(alert, frozenset({alert}), changes)


_BLOCKS = f'telltale_requests_total{{{OF}, action="block"}}'
_FIRED = f'telltale_actions_total{{{OF}, rule="refuse", action="block", mode="enforce"}}'
_SHOWN = f'telltale_alarm_rate_exceeded_total{{{OF}, rule="refuse", format="chat", policy="default"}}'
_PSI = f'telltale_score_psi{{{OF}, detector="d", stage="prompt", format="chat"}}'
_SUCCESS = f"telltale_canary_last_success_timestamp_seconds{{{OF}}}"
_HELD = f"{60 * (MINUTES - 10):g}"

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("health", frozenset()),
    _one("TelltaleCoverageGap", {f'telltale_gaps_total{{{OF}, reason="not_finite"}}': becomes("0", "7", minutes=4)}),
    _one("TelltaleNotScoring", {f"telltale_tokens_scored_total{{{OF}}}": changed(6000, 0, minutes=10)}),
    _one(
        "TelltaleCanaryFailing",
        {
            f"telltale_canary_ok{{{OF}}}": becomes("1", "0", minutes=10),
            f"telltale_ready{{{OF}}}": becomes("1", "0", minutes=10),
            f'telltale_gaps_total{{{OF}, reason="canary"}}': changed(0, 100, minutes=10),
            _BLOCKS: changed(0.5, 60, minutes=10),
            _SUCCESS: f"0+60x{MINUTES - 10} {_HELD}x10",
        },
    ),
    _one("TelltaleCanaryStale", {_SUCCESS: f"0+60x{MINUTES - 10} {_HELD}x10"}),
    Scenario("a server that is gone", frozenset({"TelltaleAbsent"}), dict.fromkeys(HEALTHY)),
    _one(
        "TelltaleUnsignedRequests",
        {f"telltale_unsigned_requests_total{{{OF}}}": becomes("0", "3", minutes=4)},
    ),
    _one("TelltaleBlockRateJump", {_BLOCKS: changed(0.5, 20, minutes=25)}),
    # What burns the budget is also shown by the test of the rate: one of them tells.
    _one("TelltaleAlarmBudgetBurnsFast", {_FIRED: changed(0.5, 30, minutes=70), _SHOWN: becomes("0", "5", minutes=50)}),
    _one("TelltaleAlarmBudgetBurns", {_FIRED: changed(0.5, 6, minutes=360), _SHOWN: becomes("0", "5", minutes=50)}),
    _one("TelltaleAlarmRateExceeded", {_FIRED: changed(0.5, 1.2, minutes=360), _SHOWN: becomes("0", "1", minutes=20)}),
    _one("TelltaleScoreDrift", dict(scores(3.0, before=0.0, minutes=90))),
    Scenario("drift from the card", frozenset({"TelltaleScoreDrift"}), {_PSI: becomes("0.02", "0.7", minutes=30)}),
    Scenario(
        "a day unlike the one before, as on the card",
        frozenset(),
        {_PSI: value(0.02), **scores(3.0, before=0.0, minutes=90)},
    ),
    _one("TelltaleUnfamiliarTraffic", {f'telltale_familiar_ratio{{{OF}, detector="odd"}}': value(0.5)}),
    _one(
        "TelltalePolicyChanged",
        {
            f'telltale_policy_info{{{OF}, digest="one"}}': becomes("1", "_", minutes=5),
            f'telltale_policy_info{{{OF}, digest="two"}}': becomes("_", "1", minutes=5),
        },
    ),
    _one(
        "TelltalePolicyNotTaken",
        {f'telltale_policy_reloads_total{{{OF}, outcome="refused"}}': becomes("0", "1", minutes=4)},
    ),
    _one(
        "TelltalePoliciesDiffer",
        {
            f'telltale_policy_info{{{OF}, digest="one"}}': becomes("1", "_", minutes=30),
            f'telltale_policy_info{{{OF}, digest="two"}}': becomes("_", "1", minutes=30),
        },
    ),
    _one("TelltaleOverhead", dict(step_times(0.02, before=0.00005, minutes=30))),
    _one(
        "TelltaleAuditFailing",
        {
            f"telltale_audit_errors_total{{{OF}}}": changed(0, 30, minutes=10),
            f"telltale_audit_dropped_total{{{OF}}}": changed(0, 40, minutes=8),
        },
    ),
    _one("TelltaleAuditLoss", {f"telltale_audit_dropped_total{{{OF}}}": becomes("0", "7", minutes=4)}),
    _one("TelltaleAuditSlow", dict(store_times(4.0, minutes=30))),
    _one("TelltaleSinkLoss", {f'telltale_sink_dead_letters_total{{{OF}, sink="a"}}': becomes("0", "2", minutes=4)}),
    Scenario(
        "messages that are dropped",
        frozenset({"TelltaleSinkLoss"}),
        {f'telltale_sink_dropped_total{{{OF}, sink="a"}}': becomes("0", "9", minutes=4)},
    ),
)
