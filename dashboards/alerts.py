"""The alerts that are shipped: one for each thing that an operator has to know of, and none that fires beside another.

Where two conditions come together by nature (a failing canary makes every token of its time a gap), the alert on the
consequence leaves out what the alert on the cause already says: one page for one failure.
"""

from __future__ import annotations

from dashboards import recordings as recorded
from dashboards.sink_alerts import sink_alerts
from dashboards.window import DAY, HOUR, MINUTE, SECOND, Clock
from monitor import catalogue
from monitor.prometheus_rule import RUNBOOKS, Alert, RuleGroup, Severity

BURN_FAST = 14.4
BURN_SLOW = 6.0
MIN_REQUESTS = 50
OBSERVE_BUDGET_SECONDS = 0.005
AUDIT_BUDGET_SECONDS = 1.0
DRIFT_IN_SPREADS = 2.0
PSI_LIMIT = 0.25
FAMILIAR_LIMIT = 0.8


def alert_groups(clock: Clock) -> tuple[RuleGroup, ...]:
    """All alerts, by what they watch."""
    return (
        RuleGroup("telltale-coverage", coverage_alerts(clock), _interval(clock)),
        RuleGroup("telltale-decisions", decision_alerts(clock), _interval(clock)),
        RuleGroup("telltale-drift", drift_alerts(clock), _interval(clock)),
        RuleGroup("telltale-operation", operation_alerts(clock), _interval(clock)),
        RuleGroup("telltale-audit", audit_alerts(clock), _interval(clock)),
        RuleGroup("telltale-sinks", sink_alerts(clock), _interval(clock)),
    )


def coverage_alerts(clock: Clock) -> tuple[Alert, ...]:
    """The monitor does not see, or nobody knows whether it does."""
    five, every = clock(5 * MINUTE), "sum by (job, instance)"
    gaps = f'increase({catalogue.GAPS.name}{{reason!="canary"}}[{five}])'
    failing = f"(max by (job, instance) ({catalogue.CANARY_OK.name}) == 0)"
    stale = clock.seconds(5 * MINUTE)
    return (
        _alert(
            "TelltaleCoverageGap",
            f"sum by (job, instance, reason) ({gaps}) > 0",
            clock(0),
            Severity.CRITICAL,
            "{{ $value | humanize }} token positions were not scored ({{ $labels.reason }})",
            "Tokens passed that no detector has read. What happened to their requests is what the policy says under "
            "on_gap.",
        ),
        _alert(
            "TelltaleNotScoring",
            f"{every} (rate(vllm:generation_tokens_total[{five}])) > 0\n"
            f"unless on (job, instance) {every} (rate({catalogue.TOKENS_SCORED.name}[{five}])) > 0\n"
            f"unless on (job, instance) {every} (increase({catalogue.GAPS.name}[{five}])) > 0",
            clock(2 * MINUTE),
            Severity.CRITICAL,
            "tokens are generated and none is scored",
            "The engine writes tokens, the monitor counts neither scores nor gaps: it is not in place.",
        ),
        _alert(
            "TelltaleCanaryFailing",
            f"max by (job, instance) ({catalogue.CANARY_OK.name}) == 0",
            clock(MINUTE),
            Severity.CRITICAL,
            "the canary fails: scores are not what the cards say",
            "A known prompt no longer gives the scores that it must give. The server is not ready, and requests follow "
            "on_gap.",
        ),
        _alert(
            "TelltaleCanaryStale",
            f"time() - max by (job, instance) ({catalogue.CANARY_LAST_SUCCESS.name}) > {stale:g}\n"
            f"unless on (job, instance) {failing}",
            clock(0),
            Severity.CRITICAL,
            "no canary has passed for {{ $value | humanizeDuration }}",
            "Nobody has proved lately that the monitor sees. The process may hang.",
        ),
        _alert(
            "TelltaleAbsent",
            f"absent({catalogue.READY.name})",
            clock(5 * MINUTE),
            Severity.CRITICAL,
            "no Telltale server is scraped",
            "Prometheus has no series of any monitored server: they are down, or something else answers at their "
            "address.",
        ),
        _alert(
            "TelltaleUnsignedRequests",
            f"{every} (increase({catalogue.UNSIGNED.name}[{five}])) > 0",
            clock(0),
            Severity.WARNING,
            "{{ $value | humanize }} requests reached the engine around our front end",
            "They were judged by the strictest policy. Something in the cluster talks to the engine directly.",
        ),
    )


def decision_alerts(clock: Clock) -> tuple[Alert, ...]:
    """The monitor sees, and what it says has changed."""
    jump, before = clock(15 * MINUTE), f"offset {clock(15 * MINUTE)}"
    requests = f"sum by (job) (increase({catalogue.REQUESTS.name}[{jump}]))"
    # Where on_gap blocks, the gap is the failure, or the canary behind it: both have alerts of their own.
    gaps = f"sum by (job) (increase({catalogue.GAPS.name}[{jump}]))"
    target = f"max by (job, rule) ({catalogue.RULE_TARGET_FPR.name})"
    return (
        _alert(
            "TelltaleBlockRateJump",
            f"{recorded.BLOCKED} > 3 * avg_over_time({recorded.BLOCKED}[{clock(6 * HOUR)}] {before}) + 0.01\n"
            f"and on (job) {requests} >= {MIN_REQUESTS}\nunless on (job) {gaps} > 0",
            clock(5 * MINUTE),
            Severity.WARNING,
            "{{ $value | humanizePercentage }} of requests are blocked, far more than before",
            "An attack, other users, or a detector that has lost its footing. Look at which rule, then at its score.",
        ),
        _burn("TelltaleAlarmBudgetBurnsFast", clock, BURN_FAST, (recorded.FIRED_LONG, recorded.FIRED_SHORT), target),
        _burn(
            "TelltaleAlarmBudgetBurns", clock, BURN_SLOW, (recorded.FIRED_SLOW_LONG, recorded.FIRED_SLOW_SHORT), target
        ),
    )


def drift_alerts(clock: Clock) -> tuple[Alert, ...]:
    """Requests are no longer what detectors were calibrated on. None of this acts on a request."""
    hour, day = clock(HOUR), clock(DAY)
    past, same = f"offset {hour}", f"on (job, {recorded.STATISTIC})"
    now_median = recorded.score_quantile(0.5, hour)
    then = {q: recorded.score_quantile(q, day, past) for q in (0.25, 0.5, 0.75)}
    count = f"sum by (job, {recorded.STATISTIC}) (increase({catalogue.DETECTOR_SCORE.name}_count[{hour}]))"
    psi = f"max by (job, {recorded.STATISTIC}) ({catalogue.SCORE_PSI.name})"
    louder = "|".join(("TelltaleBlockRateJump", "TelltaleAlarmBudgetBurnsFast", "TelltaleAlarmBudgetBurns"))
    return (
        _alert(
            "TelltaleScoreDrift",
            f"{psi} > {PSI_LIMIT:g}\n"
            f"or (\nabs(\n{now_median}\n- {then[0.5]}\n)\n> {DRIFT_IN_SPREADS:g} * (\n{then[0.75]}\n- {then[0.25]}\n)\n"
            f"and {same} {count} >= {MIN_REQUESTS}\nunless {same} {psi}\n)",
            clock(15 * MINUTE),
            Severity.WARNING,
            "the scores of {{ $labels.detector }} are not what they were calibrated on, or were a day ago",
            "The newest 500 statistics do not lie as those of the calibration on the card. Where the card holds no "
            "quantiles: the middle of an hour's lies far outside of the middle half of the day's before. Thresholds "
            "were promised for other traffic than this.",
        ),
        _alert(
            "TelltaleAlarmRateExceeded",
            f"sum by (job, rule) (increase({catalogue.ALARM_EXCEEDED.name}[{hour}])) > 0\n"
            f'unless on (job) max by (job) (max_over_time(ALERTS{{alertname=~"{louder}"}}[{hour}]))',
            clock(5 * MINUTE),
            Severity.WARNING,
            "the rule {{ $labels.rule }} fires on more requests than was promised",
            "Shown by a test that is wrong once in a thousand servers, however long they run. The excess may be small: "
            "a large one has alerts of its own, which come in the place of this.",
        ),
        _alert(
            "TelltaleUnfamiliarTraffic",
            f"min by (job, detector) ({catalogue.FAMILIAR.name}) < {FAMILIAR_LIMIT:g}",
            clock(15 * MINUTE),
            Severity.INFO,
            "{{ $value | humanizePercentage }} of requests lie within what {{ $labels.detector }} was fitted on",
            "Detectors say little about text that is unlike what they were fitted on. It need not be harmful: another "
            "language, or code, for one.",
        ),
    )


def operation_alerts(clock: Clock) -> tuple[Alert, ...]:
    """What an operator did, and what monitoring costs."""
    ten = clock(10 * MINUTE)
    info = f"max by (job, instance, digest) ({catalogue.POLICY_INFO.name})"
    earlier = f"max by (job, instance, digest) ({catalogue.POLICY_INFO.name} offset {ten})"
    return (
        _alert(
            "TelltalePolicyChanged",
            f"{info}\nunless on (job, instance, digest) {earlier}\n"
            f"and on (job, instance) max by (job, instance) ({catalogue.POLICY_INFO.name} offset {ten})",
            clock(0),
            Severity.INFO,
            "a server runs another policy than ten minutes ago",
            "The digest of policy and detectors is now {{ $labels.digest }}. If nobody rolled out a change, find out "
            "who did.",
        ),
        _alert(
            "TelltalePolicyNotTaken",
            f"sum by (job, instance, outcome) (increase({catalogue.POLICY_RELOADS.name}"
            f'{{outcome!~"applied|unchanged"}}[{ten}])) > 0',
            clock(0),
            Severity.WARNING,
            "a server was given a policy and did not take it: {{ $labels.outcome }}",
            "What ran before still runs. The server's log and telltale policy history say why.",
        ),
        _alert(
            "TelltalePoliciesDiffer",
            f"count by (job) (count by (job, digest) ({catalogue.POLICY_INFO.name})) > 1",
            clock(15 * MINUTE),
            Severity.WARNING,
            "servers of one job run {{ $value }} different policies",
            "A roll-out has stopped half-way, or a server has kept an old file.",
        ),
        _alert(
            "TelltaleOverhead",
            f"{recorded.OBSERVE_P99} > {OBSERVE_BUDGET_SECONDS:g}",
            clock(10 * MINUTE),
            Severity.WARNING,
            "one step in a hundred waits {{ $value | humanizeDuration }} for the monitor",
            f"More than the budget of {OBSERVE_BUDGET_SECONDS * 1000:g} ms a step. Users feel it between tokens.",
        ),
        _alert(
            "TelltaleWatchdog",
            "vector(1)",
            clock(0),
            Severity.NONE,
            "alerts are evaluated and delivered",
            "Fires always. Route it to a service that calls you when it stops arriving.",
        ),
    )


def audit_alerts(clock: Clock) -> tuple[Alert, ...]:
    """Events that are not written down, or late."""
    two, five, every = clock(2 * MINUTE), clock(5 * MINUTE), "sum by (job, instance)"
    failing = f"{every} (increase({catalogue.AUDIT_ERRORS.name}[{two}])) > 0"
    waits = f"sum by (job, instance, le) (rate({catalogue.AUDIT_SECONDS.name}_bucket[{five}]))"
    return (
        _alert(
            "TelltaleAuditFailing",
            failing,
            clock(2 * MINUTE),
            Severity.CRITICAL,
            "the audit trail cannot be written",
            "Each attempt for two minutes has failed. Unless the policy says on_error: allow, nothing is released.",
        ),
        _alert(
            "TelltaleAuditLoss",
            f"{every} (increase({catalogue.AUDIT_DROPPED.name}[{five}])) > 0\nunless on (job, instance) {failing}",
            clock(0),
            Severity.CRITICAL,
            "{{ $value | humanize }} events were not written down",
            "The queue of the audit trail was full, and the policy lets events go then.",
        ),
        _alert(
            "TelltaleAuditSlow",
            f"histogram_quantile(0.99, {waits}) > {AUDIT_BUDGET_SECONDS:g}\nunless on (job, instance) {failing}",
            clock(10 * MINUTE),
            Severity.WARNING,
            "one event in a hundred takes {{ $value | humanizeDuration }} to be stored",
            "With before_release, responses wait so long. The store is slow, or more is written than it can take.",
        ),
    )


def _burn(name: str, clock: Clock, factor: float, windows: tuple[str, str], target: str) -> Alert:
    """More alarms than the stated rate allows, over a long window, and still so over a short one.

    Two windows after Beyer et al., The Site Reliability Workbook (2018), chapter 5.
    """
    conditions = [f"{window} > on (job, rule) ({factor:g} * {target})" for window in windows]
    fast = factor == BURN_FAST
    return _alert(
        name,
        "\nand on (job, rule) ".join(conditions)
        + f"\nand on (job) sum by (job) (increase({catalogue.REQUESTS.name}[{clock(HOUR)}])) >= {MIN_REQUESTS}"
        + ("" if fast else f"\nunless on (job, rule) {_burns_fast(target)}"),
        clock(2 * MINUTE if fast else 15 * MINUTE),
        Severity.CRITICAL if fast else Severity.WARNING,
        "the rule {{ $labels.rule }} fires for {{ $value | humanizePercentage }} of requests",
        f"That is more than {factor:g} times the false-alarm rate that its threshold was calibrated for. Either it is "
        "right, and this is an attack; or traffic has moved away from what it was calibrated on.",
    )


def _burns_fast(target: str) -> str:
    """So that the slow one does not fire beside the fast one."""
    return f"{recorded.FIRED_LONG} > on (job, rule) ({BURN_FAST:g} * {target})"


def _alert(name: str, expression: str, hold: str, severity: Severity, *words: str) -> Alert:
    summary, description = words
    return Alert(name, expression, hold, severity, summary, description, runbook=f"{RUNBOOKS}/{name}.md")


def _interval(clock: Clock) -> str | None:
    return None if clock.factor == 1.0 else clock(SECOND)
