"""Feeds the questions of ``monitor.drift`` from reports, and tells Prometheus what comes out. Acts on no request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

from monitor import catalogue
from monitor.catalogue import Metric
from monitor.check import Check
from monitor.drift import AlarmRateTest, ScoreDrift, Share
from monitor.policy import Plan
from monitor.report import EndedReport
from probes.card import Format

Labels = tuple[str, ...]
_EVERY = 20
"""Requests from one look at a window to the next."""


class DriftMetrics:
    """Drift as one API process sees it.

    Args:
        plan: what runs; the cards' quantiles are what live statistics are compared with.
        labels: of each check, by its position.
        registry: where the metrics are registered.
    """

    def __init__(self, plan: Plan, labels: Sequence[Labels], registry: CollectorRegistry) -> None:
        self._plan = plan
        # Several processes: each sees its share of the traffic, and the worst of them is told.
        self._psi = _gauge(catalogue.SCORE_PSI, registry, "max")
        self._ks = _gauge(catalogue.SCORE_KS, registry, "max")
        self._familiar = _gauge(catalogue.FAMILIAR, registry, "min")
        self._evidence = _gauge(catalogue.ALARM_EVIDENCE, registry, "max")
        exceeded = catalogue.ALARM_EXCEEDED
        self._exceeded = Counter(exceeded.name, exceeded.help, exceeded.labels, registry=registry)
        self._labels = labels
        self._scores = dict(_scores(plan, labels))
        self._novel = {detector.name: Share() for detector in plan.bank.detectors if not detector.may_block_alone}
        self._rates = {
            (policy.name, rule.name, fmt): AlarmRateTest(target)
            for policy in plan.policies
            for rule in policy.rules
            for fmt, target in rule.target_fpr.items()
        }
        self._seen = 0
        for policy_name, rule_name, fmt in self._rates:
            self._exceeded.labels(rule_name, fmt.value, policy_name)
            self._evidence.labels(rule_name, fmt.value, policy_name).set(0)

    def ended(self, report: EndedReport) -> None:
        """One more request."""
        self._seen += 1
        fmt = Format(report.fmt)
        self._statistics(report, fmt)
        self._rules(report, fmt)
        if self._novel:
            self._unusual(report, fmt)

    def _statistics(self, report: EndedReport, fmt: Format) -> None:
        fed: set[Labels] = set()
        for position in self._plan.policies[report.policy].checks:
            # Two rules may judge one statistic by two thresholds: it counts once.
            key, statistic = self._labels[position], report.statistics[position]
            drift = self._scores.get((key, fmt))
            if drift is None or key in fed or not math.isfinite(statistic):
                continue
            fed.add(key)
            drift.add(statistic)
            if drift.knows_enough and self._seen % _EVERY == 0:
                self._psi.labels(*key, fmt.value).set(drift.psi())
                self._ks.labels(*key, fmt.value).set(drift.ks())

    def _rules(self, report: EndedReport, fmt: Format) -> None:
        policy = self._plan.policies[report.policy]
        acted = report.trail.acted if report.trail is not None else ()
        for rule in policy.rules:
            test = self._rates.get((policy.name, rule.name, fmt))
            if test is None:
                continue
            labels = (rule.name, fmt.value, policy.name)
            fired = rule.name in acted
            if test.add(fired=fired):
                self._exceeded.labels(*labels).inc()
            if fired or self._seen % _EVERY == 0:
                self._evidence.labels(*labels).set(test.log_evidence() / math.log(10))

    def _unusual(self, report: EndedReport, fmt: Format) -> None:
        found: dict[str, bool] = {}
        for position in self._plan.policies[report.policy].checks:
            check = self._plan.checks[position]
            if isinstance(check, Check) and check.detector in self._novel and fmt in check.thresholds:
                found[check.detector] = found.get(check.detector, False) or report.fired[position]
        for name, unusual in found.items():
            share = self._novel[name]
            share.add(not unusual)
            if share.knows_enough:
                self._familiar.labels(name).set(share.value)


def _scores(plan: Plan, labels: Sequence[Labels]) -> Iterator[tuple[tuple[Labels, Format], ScoreDrift]]:
    for position, key in enumerate(labels):
        for calibration in plan.calibrations(position):
            if calibration.quantiles:
                yield (key, calibration.format), ScoreDrift(calibration.quantiles, calibration.num_benign)


def _gauge(metric: Metric, registry: CollectorRegistry, mode: Literal["min", "max"]) -> Gauge:
    return Gauge(metric.name, metric.help, metric.labels, registry=registry, multiprocess_mode=mode)
