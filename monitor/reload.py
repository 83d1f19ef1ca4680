"""What of a plan may change while an engine runs, and what needs a restart. Knows no engine."""

from __future__ import annotations

from dataclasses import replace

from monitor.compiled import CompiledPolicy
from monitor.config import Config
from monitor.gates import SteerGate
from monitor.policy import Plan
from probes.errors import TelltaleError

_RELOADABLE = frozenset({"version", "model", "detectors", "steers", "policies", "tenants", "access"})
"""Keys of the policy file that are looked at more closely, or may change freely. All others are fixed at the start."""


class RestartNeededError(TelltaleError, ValueError):
    """A policy is sound, and cannot be put in force while the server runs.

    Args:
        setting: of the policy file that would have to be as it was.
        why: what speaks against it.
    """

    def __init__(self, setting: str, why: str) -> None:
        super().__init__(f"restart needed: {setting}: {why}")
        self.setting = setting


def fixed_settings(old: Config, new: Config) -> list[str]:
    """Keys whose values differ although they are fixed when a server starts."""
    changed = [key for key in Config.model_fields if key not in _RELOADABLE and getattr(old, key) != getattr(new, key)]
    return ["model", *changed] if new.model is not None and new.model != old.model else changed


def require_same_start(old: Config, new: Config) -> None:
    """Refuse a policy that was to be started with.

    Raises:
        RestartNeededError: names the first setting that cannot be changed.
    """
    for key in fixed_settings(old, new):
        raise RestartNeededError(key, "it is fixed when the server starts. Leave it as it was, or start again.")


def fitted(plan: Plan, running: Plan) -> Plan:
    """A plan, with its gates at the places where the engine that runs has put them.

    Args:
        plan: that is to run.
        running: whose steers and gates are in the model.
    Raises:
        RestartNeededError: it steers otherwise: what writes to a layer is put in place before the model is compiled.
    """
    if plan.steering.digest() != running.steering.digest():
        raise RestartNeededError(
            "steers",
            "what may be written to the model is put in place before it is compiled. Leave the list as it was.",
        )
    free = dict(enumerate(running.steering.gates))
    moved: dict[int, int] = {}
    for number, gate in enumerate(plan.steering.gates):
        found = next((place for place, put in free.items() if _place(put) == _place(gate)), None)
        if found is None:
            raise RestartNeededError(
                "steers",
                f"a rule steers by a gate that reads {gate.check.detector!r} at {gate.tap}; no gate of the start reads "
                "there for this steer. Gates are put in place before the model is compiled.",
            )
        moved[number] = found
        del free[found]
    gates = list(running.steering.gates)
    for number, place in moved.items():
        gates[place] = plan.steering.gates[number]
    policies = tuple(_moved(policy, moved) for policy in plan.policies)
    return replace(plan, policies=policies, steering=replace(plan.steering, gates=tuple(gates)))


def _place(gate: SteerGate) -> tuple[object, ...]:
    return gate.steer, gate.kind, gate.tap, gate.column


def _moved(policy: CompiledPolicy, moved: dict[int, int]) -> CompiledPolicy:
    rules = tuple(replace(rule, gate=moved[rule.gate]) if rule.gate is not None else rule for rule in policy.rules)
    return replace(policy, rules=rules)
