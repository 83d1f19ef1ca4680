"""The policy of requests that nobody vouches for: what any policy would stop, this one stops. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from monitor.attempt import Attempt
from monitor.compiled import CompiledPolicy, CompiledRule
from monitor.rule import Scope
from monitor.types import STRICTEST, Action, Expose


def strictest(policies: Sequence[CompiledPolicy]) -> CompiledPolicy:
    """All rules of all policies at once, and the most severe of everything else.

    Rules act under ``policy/rule``, for everybody, whatever their rollout. One that steers flags here: steers of two
    policies were never tried together, and what one writes another would read. One that escalates, routes or
    regenerates blocks: nobody withholds the reply until that is done.

    Args:
        policies: at least one.
    """
    return CompiledPolicy(
        name=STRICTEST,
        on_gap=max((policy.on_gap for policy in policies), key=_severity),
        on_uncalibrated=max((policy.on_uncalibrated for policy in policies), key=_severity),
        hold_back=max(policy.hold_back for policy in policies),
        expose=Expose.ACTIONS,
        text=policies[0].text,
        # Nobody says which session they belong to.
        rules=tuple(_of(policy, rule) for policy in policies for rule in policy.rules if rule.conversation is None),
        checks=tuple(sorted({check for policy in policies for check in policy.checks})),
    )


def _of(policy: CompiledPolicy, rule: CompiledRule) -> CompiledRule:
    action = Action.FLAG if rule.action is Action.STEER else rule.does(Attempt.UNHELD)
    return replace(
        rule,
        name=f"{policy.name}/{rule.name}",
        action=action,
        steer=None,
        gate=None,
        handling=None,
        share=None,
        scope=Scope.REQUEST if action is Action.BLOCK else Scope.CHOICE,
    )


def _severity(action: Action) -> int:
    return action.severity
