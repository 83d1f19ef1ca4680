"""Feeds the questions of ``monitor.drift`` from reports, and tells Prometheus what comes out. Acts on no request."""

from __future__ import annotations

import math
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

from monitor import catalogue
from monitor.catalogue import Metric
from monitor.check import Check
from monitor.drift import AlarmRateTest, ScoreDrift, Share
from monitor.policy import Plan
from monitor.report import EndedReport
from monitor.score_histograms import Labels, labels_of
from probes.card import Format

_EVERY = 20
"""Requests from one look at a window to the next."""


class DriftMetrics:
    """Drift as one API process sees it.

    Args:
        registry: where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        # Several processes: each sees its share of the traffic, and the worst of them is told.
        self._psi = _gauge(catalogue.SCORE_PSI, registry, "max")
        self._ks = _gauge(catalogue.SCORE_KS, registry, "max")
        self._familiar = _gauge(catalogue.FAMILIAR, registry, "min")
        self._evidence = _gauge(catalogue.ALARM_EVIDENCE, registry, "max")
        exceeded = catalogue.ALARM_EXCEEDED
        self._exceeded = Counter(exceeded.name, exceeded.help, exceeded.labels, registry=registry)
        self._watch: _Watch | None = None

    def adopt(self, plan: Plan) -> None:
        """Requests are compared with the cards and the promises of this plan from now on; all windows begin anew."""
        for gauge in (self._psi, self._ks, self._familiar, self._evidence) if self._watch is not None else ():
            gauge.clear()
        self._watch = _Watch(plan)
        for policy_name, rule_name, fmt in self._watch.rates:
            self._exceeded.labels(rule_name, fmt.value, policy_name)
            self._evidence.labels(rule_name, fmt.value, policy_name).set(0)

    def ended(self, plan: Plan, report: EndedReport) -> None:
        """One more request; one of another plan than the one in force says nothing about that."""
        watch = self._watch
        if watch is None or watch.plan.digest != plan.digest:
            return
        watch.seen += 1
        fmt = Format(report.fmt)
        self._statistics(watch, report, fmt)
        self._rules(watch, report, fmt)
        if watch.novel:
            self._unusual(watch, report, fmt)

    def _statistics(self, watch: _Watch, report: EndedReport, fmt: Format) -> None:
        fed: set[Labels] = set()
        for position in watch.plan.policies[report.policy].checks:
            # Two rules may judge one statistic by two thresholds: it counts once.
            key, statistic = watch.labels[position], report.statistics[position]
            drift = watch.scores.get((key, fmt))
            if drift is None or key in fed or not math.isfinite(statistic):
                continue
            fed.add(key)
            drift.add(statistic)
            if drift.knows_enough and watch.seen % _EVERY == 0:
                self._psi.labels(*key, fmt.value).set(drift.psi())
                self._ks.labels(*key, fmt.value).set(drift.ks())

    def _rules(self, watch: _Watch, report: EndedReport, fmt: Format) -> None:
        policy = watch.plan.policies[report.policy]
        acted = report.trail.acted if report.trail is not None else ()
        for rule in policy.rules:
            test = watch.rates.get((policy.name, rule.name, fmt))
            if test is None:
                continue
            labels = (rule.name, fmt.value, policy.name)
            fired = rule.name in acted
            if test.add(fired=fired):
                self._exceeded.labels(*labels).inc()
            if fired or watch.seen % _EVERY == 0:
                self._evidence.labels(*labels).set(test.log_evidence() / math.log(10))

    def _unusual(self, watch: _Watch, report: EndedReport, fmt: Format) -> None:
        found: dict[str, bool] = {}
        for position in watch.plan.policies[report.policy].checks:
            check = watch.plan.checks[position]
            if isinstance(check, Check) and check.detector in watch.novel and fmt in check.thresholds:
                found[check.detector] = found.get(check.detector, False) or report.fired[position]
        for name, unusual in found.items():
            share = watch.novel[name]
            share.add(not unusual)
            if share.knows_enough:
                self._familiar.labels(name).set(share.value)


class _Watch:
    """What is remembered of the requests of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seen = 0
        self.labels = labels_of(plan)
        self.scores = {
            (self.labels[position], calibration.format): ScoreDrift(calibration.quantiles, calibration.num_benign)
            for position in range(len(plan.checks))
            for calibration in plan.calibrations(position)
            if calibration.quantiles
        }
        self.novel = {detector.name: Share() for detector in plan.bank.detectors if not detector.may_block_alone}
        self.rates = {
            (policy.name, rule.name, fmt): AlarmRateTest(target)
            for policy in plan.policies
            for rule in policy.rules
            for fmt, target in rule.target_fpr.items()
        }


def _gauge(metric: Metric, registry: CollectorRegistry, mode: Literal["min", "max"]) -> Gauge:
    return Gauge(metric.name, metric.help, metric.labels, registry=registry, multiprocess_mode=mode)
