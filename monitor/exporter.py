"""Prometheus: turn step reports into the metrics of the catalogue. Knows no engine and no HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from monitor import catalogue
from monitor.canary import CanaryFailure
from monitor.catalogue import Metric
from monitor.compiled import CompiledPolicy
from monitor.policy import Plan
from monitor.report import EndedReport, StepReport
from monitor.types import Action, ActionCode, Gap, Mode, PromptEvent, ReloadOutcome, Skip


class Exporter:
    """The metrics of one API process.

    Args:
        plan: what runs; its detectors and thresholds are the label values.
        registry: where the metrics are registered.
    """

    def __init__(self, plan: Plan, registry: CollectorRegistry) -> None:
        self._plans = {plan.digest: plan}
        self._requests = _counter(catalogue.REQUESTS, registry)
        self._actions = _counter(catalogue.ACTIONS, registry)
        self._scores = _histogram(catalogue.DETECTOR_SCORE, registry)
        self._score_by_check: dict[tuple[str, int], Histogram] = {}
        self._fired = _counter(catalogue.DETECTOR_FIRED, registry)
        self._scored = _counter(catalogue.TOKENS_SCORED, registry)
        self._skipped = _counter(catalogue.TOKENS_SKIPPED, registry)
        self._gaps = _counter(catalogue.GAPS, registry)
        self._events = _counter(catalogue.PROMPT_EVENTS, registry)
        self._steered = _counter(catalogue.TOKENS_STEERED, registry)
        self._unsigned = _counter(catalogue.UNSIGNED, registry)
        self._observe = _histogram(catalogue.OBSERVE_SECONDS, registry)
        self._ready = _gauge(catalogue.READY, registry)
        self._canary_ok = _gauge(catalogue.CANARY_OK, registry)
        self._canary_success = _gauge(catalogue.CANARY_LAST_SUCCESS, registry)
        self._canary_seconds = _gauge(catalogue.CANARY_SECONDS, registry)
        self._canary_failures = _counter(catalogue.CANARY_FAILURES, registry)
        self._threshold = _gauge(catalogue.DETECTOR_THRESHOLD, registry)
        self._target = _gauge(catalogue.RULE_TARGET_FPR, registry)
        self._info = _gauge(catalogue.POLICY_INFO, registry)
        self._reloads = _counter(catalogue.POLICY_RELOADS, registry)
        # A series that starts at zero makes the first gap or block a visible increase.
        for gap in Gap:
            self._gaps.labels(gap.value)
        for skip in Skip:
            self._skipped.labels(skip.value)
        for event in PromptEvent:
            self._events.labels(event.value)
        for failure in CanaryFailure:
            self._canary_failures.labels(failure.value)
        for outcome in ReloadOutcome:
            self._reloads.labels(outcome.value)
        for steer in plan.steering.steers:
            self._steered.labels(steer.name)
        self._show(plan)

    def hold(self, plans: Mapping[str, Plan]) -> None:
        """Which plans reports may speak of from now on, by their digests."""
        self._plans = dict(plans)
        self._score_by_check = {key: found for key, found in self._score_by_check.items() if key[0] in plans}

    def adopt(self, plan: Plan) -> None:
        """Another plan is in force. What was counted goes on; thresholds are those of the new one alone."""
        for gauge in (self._threshold, self._target, self._info):
            gauge.clear()
        self._show(plan)

    def reloaded(self, outcome: ReloadOutcome) -> None:
        """The server was given a policy."""
        self._reloads.labels(outcome.value).inc()

    def _show(self, plan: Plan) -> None:
        self._info.labels(plan.digest[:16]).set(1)
        for policy in plan.policies:
            owners = {number: rule.name for rule in policy.rules for number in rule.verdicts}
            for position in policy.checks:
                check, owner = plan.checks[position], owners.get(position, "")
                self._fired.labels(*_labels_of(plan, position))
                for fmt, value in check.thresholds.items():
                    labels = owner, check.detector, check.stage.value, fmt.value, policy.name
                    self._threshold.labels(*labels).set(value)
            self._begin(policy)
            for rule in policy.rules:
                for fmt, rate in rule.target_fpr.items():
                    self._target.labels(rule.name, fmt.value, policy.name).set(rate)

    def _begin(self, policy: CompiledPolicy) -> None:
        for action in Action:
            self._requests.labels(action.value, policy.name)
        for rule in policy.rules:
            for mode in (rule.mode,) if rule.share is None else Mode:
                self._actions.labels(rule.name, rule.action.value, mode.value, policy.name)

    def canary_passed(self, seconds: float) -> None:
        """A round of canaries has passed on every engine: the server sees, and is ready."""
        self._canary_seconds.set(seconds)
        self._canary_success.set_to_current_time()
        self._canary_ok.set(1)
        self._ready.set(1)

    def canary_failed(self, reason: CanaryFailure) -> None:
        """A canary has failed: the server is not ready."""
        self._canary_failures.labels(reason.value).inc()
        self.not_ready()

    def not_ready(self) -> None:
        """The engine has gone, or its canary fails."""
        self._canary_ok.set(0)
        self._ready.set(0)

    def record(self, report: StepReport) -> None:
        """Count one report."""
        for ended in report.ended:
            self._record_ended(ended, self._plans[report.plan])
        tally = report.tally
        if tally is None:
            return
        self._scored.inc(tally.scored)
        for reason, count in tally.skipped.items():
            self._skipped.labels(reason).inc(count)
        for reason, count in tally.gaps.items():
            self._gaps.labels(reason).inc(count)
        for rule, action, mode, policy, count in tally.acted:
            self._actions.labels(rule, action, mode, policy).inc(count)
        for event, count in tally.events.items():
            self._events.labels(event).inc(count)
        for steer, count in tally.steered.items():
            self._steered.labels(steer).inc(count)
        self._unsigned.inc(tally.unsigned)
        for seconds in tally.observe_seconds:
            self._observe.observe(seconds)

    def _record_ended(self, ended: EndedReport, plan: Plan) -> None:
        action = ActionCode(ended.decided.action).action if ended.decided is not None else Action.ALLOW
        policy = plan.policies[ended.policy]
        self._requests.labels(action.value, policy.name).inc()
        for position in policy.checks:
            statistic = ended.statistics[position]
            if math.isfinite(statistic):
                self._score_of(plan, position).observe(statistic)
            if ended.fired[position]:
                self._fired.labels(*_labels_of(plan, position)).inc()

    def _score_of(self, plan: Plan, position: int) -> Histogram:
        """The histogram of a check, which is there once the first request was judged by it."""
        key = plan.digest, position
        if key not in self._score_by_check:
            self._score_by_check[key] = self._scores.labels(*_labels_of(plan, position))
        return self._score_by_check[key]


def _labels_of(plan: Plan, position: int) -> tuple[str, str, str, str]:
    check = plan.checks[position]
    return check.detector, check.stage.value, check.statistic, ",".join(check.segments or ())


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)


def _gauge(metric: Metric, registry: CollectorRegistry) -> Gauge:
    return Gauge(metric.name, metric.help, metric.labels, registry=registry, multiprocess_mode="mostrecent")


def _histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)
