"""The alerts of a policy file as rules for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from monitor import catalogue
from monitor.flag_alert import FlagAlert, Watched
from monitor.prometheus_rule import RUNBOOKS, Alert, RuleGroup, rule_file
from monitor.types import STRICTEST

FILE_NAME = "telltale.flagged.rules.yaml"
RUNBOOK = "TelltaleFlagged"
_ALERTS = {
    Watched.RULE: "TelltaleRuleFlagged",
    Watched.DETECTOR: "TelltaleDetectorFlagged",
    Watched.LATENTS: "TelltaleLatentsFlagged",
}


def flag_rules(alerts: Sequence[FlagAlert], *, origin: str, interval: str | None = None) -> str:
    """The rule file.

    Args:
        alerts: at least one.
        origin: how the file is made; stands in its first line.
        interval: between two evaluations; Prometheus' own if left out.
    """
    group = RuleGroup("telltale-flagged", [_rule(alert) for alert in alerts], interval)
    return rule_file([group], origin=origin)


def _rule(alert: FlagAlert) -> Alert:
    entry, labels = alert.entry, {} if alert.entry.notify is None else {"notify": alert.entry.notify}
    if alert.watched is Watched.RULE:
        counted, by, who = _of_rule(alert), "job", f"the rule {alert.names[0]} of the policy {alert.policy}"
        labels = {"rule": alert.names[0], "policy": alert.policy, **labels}
    else:
        names = "|".join(alert.names)
        counted = f'{catalogue.FLAGGED.name}{{detector=~"{names}"}}'
        by, who = (
            "job, detector",
            f"{'latents' if alert.watched is Watched.LATENTS else 'detector'} " + ("{{ $labels.detector }}"),
        )
    # increase() extrapolates to the whole window: rounded, it is a number of requests again.
    expression = f"round(sum by ({by}) (increase({counted}[{entry.window}]))) {entry.condition}"
    return Alert(
        _ALERTS[alert.watched],
        expression,
        entry.hold,
        entry.severity,
        f"{who}: {{{{ $value }}}} flagged requests within {entry.window}",
        f"The policy file asks for a {entry.in_words()}. Requests count once, those in shadow too.",
        labels=labels,
        runbook=f"{RUNBOOKS}/{RUNBOOK}.md",
    )


def _of_rule(alert: FlagAlert) -> str:
    """The rule's counter: also with a tenant's thresholds, and among the rules of requests nobody vouches for."""
    policy = f"{alert.policy}(@.+)?"
    return f'{catalogue.ACTIONS.name}{{rule=~"({policy}/)?{alert.names[0]}", policy=~"{policy}|{STRICTEST}"}}'
