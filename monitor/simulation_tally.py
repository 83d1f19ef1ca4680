"""Counts what a policy would have done over a recorded period, beside what was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from monitor.compiled import CompiledPolicy
from monitor.events import Decision
from monitor.policy import Plan
from monitor.simulation import Simulated, simulate
from monitor.types import ON_GAP, ON_UNCALIBRATED, Action, Mode


@dataclass(slots=True)
class RuleCount:
    """Requests by what became, and would have become, of one rule.

    Attributes:
        would: it would have fired.
        did: a rule of that name, in that policy, fired.
        more: it would have and did not.
        fewer: it did and would not have.
        unknown: cannot be told.
        why: of those, how many for which reason, in words.
    """

    would: int = 0
    did: int = 0
    more: int = 0
    fewer: int = 0
    unknown: int = 0
    why: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class PolicyCount:
    """All requests of one policy.

    Attributes:
        policy: it.
        requests: how many were looked at.
        steered: of those, were steered: their replies are taken as they are.
        rules: by name, in the order of the file, the two of the policy itself at the end.
        actions: by the recorded action and the one that would have been; None: cannot be told.
    """

    policy: CompiledPolicy
    requests: int = 0
    steered: int = 0
    rules: dict[str, RuleCount] = field(default_factory=dict)
    actions: Counter[tuple[Action, Action | None]] = field(default_factory=Counter)


class SimulationTally:
    """Takes the decisions of a period.

    Args:
        plan: of the policy file that is tried.
        only: name of the policy that all requests are tried with; None: each with the one of the name that it had.
    """

    def __init__(self, plan: Plan, only: str | None = None) -> None:
        self._plan = plan
        self._only = only
        self._policies = {policy.name: policy for policy in plan.policies}
        self._counts: dict[str, PolicyCount] = {}
        self.without_policy: Counter[str] = Counter()

    def take(self, recorded: Decision) -> None:
        """Try the policy on one more request."""
        policy = self._policies.get(self._only or recorded.policy)
        if policy is None:
            self.without_policy[recorded.policy] += 1
            return
        if policy.name not in self._counts:
            names = [*(rule.name for rule in policy.rules), ON_GAP, ON_UNCALIBRATED]
            self._counts[policy.name] = PolicyCount(policy, rules={name: RuleCount() for name in names})
        count = self._counts[policy.name]
        found = simulate(self._plan, policy, recorded)
        count.requests += 1
        count.steered += bool(recorded.steers)
        count.actions[recorded.action, found.action] += 1
        self._take_rules(count, found, recorded)

    @property
    def counts(self) -> Iterator[PolicyCount]:
        """Policies that requests were tried with, in the order of the plan."""
        return (self._counts[name] for name in self._policies if name in self._counts)

    @staticmethod
    def _take_rules(count: PolicyCount, found: Simulated, recorded: Decision) -> None:
        acted = {rule.name for rule in recorded.rules}
        for name, told in found.rules.items():
            rule, did = count.rules[name], name in acted
            rule.did += did
            if told.fires is None:
                rule.unknown += 1
                rule.why.update(f"{what}: {why.value}" for what, why in told.why.items())
                continue
            rule.would += told.fires
            rule.more += told.fires and not did
            rule.fewer += did and not told.fires


def mode_of(policy: CompiledPolicy, name: str) -> Mode:
    """The mode of a rule, or of what a policy does by itself."""
    return next((rule.mode for rule in policy.rules if rule.name == name), Mode.ENFORCE)


def action_of(policy: CompiledPolicy, name: str) -> Action:
    """What a rule, or the policy by itself, does."""
    own = {ON_GAP: policy.on_gap, ON_UNCALIBRATED: policy.on_uncalibrated}
    return next((rule.action for rule in policy.rules if rule.name == name), own.get(name, Action.ALLOW))
