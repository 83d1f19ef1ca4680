"""Prometheus: turn step reports into the metrics of the catalogue. Knows no engine and no HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from monitor import catalogue
from monitor.canary import CanaryFailure
from monitor.catalogue import Metric
from monitor.check import Check
from monitor.compiled import CompiledPolicy
from monitor.drift_metrics import DriftMetrics
from monitor.outcome import HandledRule, Outcome
from monitor.policy import Plan
from monitor.report import EndedReport, StepReport, TallyReport, Trail
from monitor.score_histograms import Labels, ScoreHistograms, labels_of
from monitor.tenant_metrics import TenantMetrics
from monitor.types import Action, ActionCode, Gap, Mode, Phase, PromptEvent, ReloadOutcome, Skip
from probes.card import Stage


class Exporter:
    """The metrics of one API process.

    Args:
        plan: what runs; its detectors and thresholds are the label values.
        registry: where the metrics are registered.
    """

    def __init__(self, plan: Plan, registry: CollectorRegistry) -> None:
        self._plans = {plan.digest: plan}
        self._labels: dict[str, tuple[Labels, ...]] = {}
        self._requests = _counter(catalogue.REQUESTS, registry)
        self._actions = _counter(catalogue.ACTIONS, registry)
        self._outcomes = _counter(catalogue.OUTCOMES, registry)
        self._scores = ScoreHistograms()
        registry.register(self._scores)
        self._drift = DriftMetrics(registry)
        self._tenants = TenantMetrics(registry)
        self._fired = _counter(catalogue.DETECTOR_FIRED, registry)
        self._flagged = _counter(catalogue.FLAGGED, registry)
        self._delay = _histogram(catalogue.DETECTION_DELAY, registry)
        self._scored = _counter(catalogue.TOKENS_SCORED, registry)
        self._skipped = _counter(catalogue.TOKENS_SKIPPED, registry)
        self._gaps = _counter(catalogue.GAPS, registry)
        self._events = _counter(catalogue.PROMPT_EVENTS, registry)
        self._steered = _counter(catalogue.TOKENS_STEERED, registry)
        self._unsigned = _counter(catalogue.UNSIGNED, registry)
        self._observe = _histogram(catalogue.OBSERVE_SECONDS, registry)
        self._overhead = _histogram(catalogue.OVERHEAD_SECONDS, registry)
        self._held = _gauge(catalogue.HELD_BACK, registry)
        # Of several API processes each sends its own canaries: the server is as good as the worst of them.
        self._ready = _gauge(catalogue.READY, registry, "min")
        self._canary_ok = _gauge(catalogue.CANARY_OK, registry, "min")
        self._canary_success = _gauge(catalogue.CANARY_LAST_SUCCESS, registry, "min")
        self._canary_seconds = _gauge(catalogue.CANARY_SECONDS, registry, "max")
        self._canary_deviation = _gauge(catalogue.CANARY_DEVIATION, registry, "max")
        self._canary_failures = _counter(catalogue.CANARY_FAILURES, registry)
        self._threshold = _gauge(catalogue.DETECTOR_THRESHOLD, registry)
        self._target = _gauge(catalogue.RULE_TARGET_FPR, registry)
        self._info = _gauge(catalogue.POLICY_INFO, registry)
        self._reloads = _counter(catalogue.POLICY_RELOADS, registry)
        self._artifacts = _gauge(catalogue.ARTIFACT_INFO, registry)
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
        for phase in Phase:
            self._overhead.labels(phase.value)
        for steer in plan.steering.steers:
            self._steered.labels(steer.name)
        self._show(plan)

    def hold(self, plans: Mapping[str, Plan]) -> None:
        """Which plans reports may speak of from now on, by their digests."""
        self._plans = dict(plans)
        self._labels = {digest: labels_of(plan) for digest, plan in plans.items()}

    def adopt(self, plan: Plan) -> None:
        """Another plan is in force. What was counted goes on; thresholds are those of the new one alone."""
        for gauge in (self._threshold, self._target, self._info, self._artifacts):
            gauge.clear()
        self._show(plan)

    def reloaded(self, outcome: ReloadOutcome) -> None:
        """The server was given a policy."""
        self._reloads.labels(outcome.value).inc()

    def _show(self, plan: Plan) -> None:
        self._info.labels(plan.digest[:16]).set(1)
        self._labels[plan.digest] = labels_of(plan)
        self._drift.adopt(plan)
        self._tenants.adopt(plan)
        for name, card in plan.cards.items():
            self._artifacts.labels(name, card.kind, card.tensors_digest[:16]).set(1)
            self._flagged.labels(name)
        for policy in plan.policies:
            owners = {number: rule.name for rule in policy.rules for number in rule.verdicts}
            for position in policy.checks:
                check, owner = plan.checks[position], owners.get(position, "")
                self._fired.labels(*self._labels[plan.digest][position])
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
            if rule.handling is not None:
                for outcome in Outcome:
                    self._outcomes.labels(rule.name, rule.action.value, outcome.value, policy.name)

    def canary_passed(self, seconds: float, deviation: float = 0.0) -> None:
        """A round of canaries has passed on every engine: the server sees, and is ready.

        Args:
            seconds: that it took.
            deviation: largest difference from the cards, as a share of what is allowed.
        """
        self._canary_seconds.set(seconds)
        self._canary_deviation.set(deviation)
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
        if report.tally is not None:
            self._record_tally(report.tally)

    def took(self, seconds: float) -> None:
        """This process has dealt with the reports of a step in so many seconds."""
        self._overhead.labels(Phase.API.value).observe(seconds)

    def _record_tally(self, tally: TallyReport) -> None:
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
        for phase, spent in tally.overhead.items():
            histogram = self._overhead.labels(phase)
            for seconds in spent:
                histogram.observe(seconds)
        self._held.set(tally.held)

    def handled(self, rule: HandledRule, outcome: Outcome) -> None:
        """A rule that withholds was carried out."""
        self._outcomes.labels(rule.name, rule.action.value, outcome.value, rule.policy).inc()

    def _record_ended(self, ended: EndedReport, plan: Plan) -> None:
        if not ended.counted:
            return
        action = ActionCode(ended.decided.action).action if ended.decided is not None else Action.ALLOW
        policy = plan.policies[ended.policy]
        self._requests.labels(action.value, policy.name).inc()
        # Two rules may judge one statistic by two thresholds: it counts once, and above either is above.
        of = self._labels[plan.digest]
        statistics: dict[Labels, int] = {}
        above: set[Labels] = set()
        flagged: set[str] = set()
        for position in policy.checks:
            labels, check = of[position], plan.checks[position]
            statistics.setdefault(labels, position)
            if ended.fired[position]:
                above.add(labels)
                flagged |= {check.detector} if isinstance(check, Check) else set()
        for labels, position in statistics.items():
            if math.isfinite(ended.statistics[position]):
                self._scores.observe(plan, labels, ended.statistics[position])
        for labels in above:
            self._fired.labels(*labels).inc()
        for name in flagged:
            self._flagged.labels(name).inc()
        if ended.trail is not None:
            self._record_delays(ended.trail, plan)
        self._tenants.ended(plan, ended, action)
        self._drift.ended(plan, ended)

    def _record_delays(self, trail: Trail, plan: Plan) -> None:
        for position, fired_at in trail.fired_at.items():
            check = plan.checks[position]
            if check.stage is Stage.STREAM:
                self._delay.labels(check.detector, check.statistic).observe(fired_at - trail.stream_from + 1)


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)


def _gauge(
    metric: Metric, registry: CollectorRegistry, mode: Literal["mostrecent", "min", "max"] = "mostrecent"
) -> Gauge:
    """Args: mode: what several processes' values are together."""
    return Gauge(metric.name, metric.help, metric.labels, registry=registry, multiprocess_mode=mode)


def _histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)
