"""What each tenant's requests were and met. Labels are names of the policy file, never keys, digests or headers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from monitor import catalogue
from monitor.catalogue import Metric
from monitor.policy import Plan
from monitor.report import EndedReport
from monitor.types import RESERVED_RULES, Action

NOBODY = "-"
"""No tenant of a policy file can be called so."""


class TenantMetrics:
    """Counts by tenant.

    Args:
        registry: where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = _counter(catalogue.TENANT_REQUESTS, registry)
        self._rules = _counter(catalogue.TENANT_RULES, registry)
        self._tokens = _counter(catalogue.TENANT_TOKENS, registry)

    def adopt(self, plan: Plan) -> None:
        """Let the series of a plan's tenants begin at zero."""
        policies = {policy.name: policy for policy in plan.policies}
        for tenant in plan.tenants.values():
            self._begin(tenant.name)
            gets = {tenant.policy, *(tenant.by_model or {}).values(), *tenant.by_header.values()}
            for named in {rule.name for name in gets for rule in policies[name].rules}:
                self._rules.labels(tenant.name, named)
        if not plan.tenants:
            self._begin(NOBODY)
            for rule in plan.policies[0].rules:
                self._rules.labels(NOBODY, rule.name)

    def _begin(self, tenant: str) -> None:
        self._tokens.labels(tenant)
        for action in Action:
            self._requests.labels(tenant, action.value)
        for reserved in RESERVED_RULES:
            self._rules.labels(tenant, reserved)

    def ended(self, plan: Plan, report: EndedReport, action: Action) -> None:
        """One more request of a plan, and the most severe action that was enforced on it."""
        named = any(report.tenant == tenant.name for tenant in plan.tenants.values())
        tenant = report.tenant if named else NOBODY
        self._requests.labels(tenant, action.value).inc()
        self._tokens.labels(tenant).inc(report.scored)
        for rule in report.trail.acted if report.trail is not None else ():
            self._rules.labels(tenant, rule).inc()


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)
