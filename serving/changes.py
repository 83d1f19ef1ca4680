"""What changes from one policy file to another, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from monitor.compiled import CompiledPolicy, CompiledRule
from monitor.config import Config
from monitor.policy import Plan
from monitor.reload import RestartNeededError, fitted, fixed_settings
from monitor.verdicts import AnyCheck
from probes.card import Format
from serving.commands.explain import explain, in_words, share_in_words

Facts = Mapping[tuple[str, str], str]
"""What is said of a thing: by the thing and what of it."""


class Change(StrEnum):
    """What became of something."""

    ADDED = "+"
    REMOVED = "-"
    CHANGED = "~"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was.

    Attributes:
        change: what became of it.
        what: a detector, a rule, a tenant.
        said: in words.
    """

    change: Change
    what: str
    said: str


def differences(old: Plan, new: Plan) -> list[Difference]:
    """What the new plan does that the old one does not, and the other way round.

    Args:
        old: that runs.
        new: that is to run.
    """
    before, after = dict(_facts(old)), dict(_facts(new))
    known = {what for what, _ in before}, {what for what, _ in after}
    found = []
    for what in dict.fromkeys(what for what, _ in (*after, *before)):
        if what not in known[0]:
            found.append(Difference(Change.ADDED, what, _summary(after, what)))
        elif what not in known[1]:
            found.append(Difference(Change.REMOVED, what, _summary(before, what)))
        else:
            keys = dict.fromkeys(key for thing, key in (*before, *after) if thing == what)
            for key in keys:
                was, now = before.get((what, key)), after.get((what, key))
                if was != now:
                    found.append(Difference(Change.CHANGED, what, f"{key}: {was or 'none'} -> {now or 'none'}"))
    return found


def restarts(old_config: Config, new_config: Config, old: Plan, new: Plan) -> list[str]:
    """Why a server that was started with the old file cannot take the new one over while it runs; one line each.

    Args:
        old_config: of the file that runs.
        new_config: of the other one.
        old: its plan.
        new: that of the other one.
    """
    lines = [f"{key}: it is fixed when the server starts" for key in fixed_settings(old_config, new_config)]
    for tap in new.bank.taps:
        if tap not in old.bank.taps:
            readers = [name for name, columns in new.bank.columns.items() if tap in columns]
            lines.append(f"detectors: {tap} is read by {', '.join(readers)}, and by none of the old file")
    old_columns, capacity = old.bank.residents(), old.bank.capacity
    for tap, columns in new.bank.residents().items():
        together = len({*columns.values(), *old_columns.get(tap, {}).values()})
        if tap in old.bank.taps and together > capacity:
            lines.append(
                f"reserve.directions: {together} columns at {tap} while both are in force, and {capacity} are reserved"
            )
    try:
        fitted(new, old)
    except RestartNeededError as error:
        lines.append(str(error).removeprefix("restart needed: "))
    return lines


def _summary(facts: Facts, what: str) -> str:
    return "; ".join(f"{key}: {said}" for (thing, key), said in facts.items() if thing == what)


def _facts(plan: Plan) -> Iterator[tuple[tuple[str, str], str]]:
    for detector in plan.bank.detectors:
        what = f"detector {detector.name}"
        yield (what, "kind"), detector.kind
        yield (what, "reads"), ", ".join(map(str, sorted(plan.bank.columns[detector.name])))
        yield (what, "weights"), plan.cards[detector.name].tensors_digest[:12]
    for steer in plan.steering.steers:
        what = f"steer {steer.name}"
        yield (what, "writes"), f"after {steer.tap}, {steer.positions.value}"
        yield (what, "is"), steer.digest()[:12]
    for policy in plan.policies:
        yield from _of_policy(policy, plan)
    for tenant in plan.tenants.values():
        what = f"tenant {tenant.name}"
        yield (what, "policy"), tenant.policy
        yield (what, "by model"), _listed(tenant.by_model or {})
        yield (what, "by header"), _listed(tenant.by_header)
    for digest, tenant in plan.tenants.items():
        yield (f"tenant {tenant.name}", "key"), f"{digest[:12]}..."


def _of_policy(policy: CompiledPolicy, plan: Plan) -> Iterator[tuple[tuple[str, str], str]]:
    what = f"policy {policy.name}"
    yield (what, "on_gap"), policy.on_gap.value
    yield (what, "on_uncalibrated"), policy.on_uncalibrated.value
    yield (what, "hold_back"), str(policy.hold_back)
    yield (what, "expose"), policy.expose.value
    yield (what, "quantise"), f"{policy.quantise:g}"
    every = policy.probing.false_alarm_every if policy.probing is not None else None
    yield (
        (what, "probing"),
        f"told of, with a false alarm every {every} requests" if every is not None else "not watched",
    )
    yield (what, "text"), repr(policy.text)
    yield (what, "order of rules"), ", ".join(rule.name for rule in policy.rules)
    for key, numbers in (("steers", policy.steers), ("on_request", policy.on_request)):
        yield (what, key), ", ".join(plan.steering.steers[number].name for number in numbers)
    for rule in policy.rules:
        yield from _of_rule(f"rule {policy.name}/{rule.name}", rule, plan)


def _of_rule(what: str, rule: CompiledRule, plan: Plan) -> Iterator[tuple[tuple[str, str], str]]:
    yield (what, "does"), rule.action.value
    yield (what, "mode"), rule.mode.value
    if rule.conversation is not None:
        yield (what, "over conversations"), explain(rule, plan)
    else:
        yield (what, "if"), in_words(rule.condition, plan)
        yield (what, "known"), explain(rule, plan).split(", if ")[0].split(", ")[-1]
    yield (what, "for"), share_in_words(rule.share) if rule.share is not None else "everybody"
    yield (what, "text"), repr(rule.text)
    yield (what, "scope"), rule.scope.value
    if rule.steer is not None:
        yield (what, "steer"), plan.steering.steers[rule.steer].name
    for number in rule.verdicts:
        check = plan.checks[number]
        for fmt in sorted(check.thresholds):
            key = f"{check.detector} at {check.stage.value} in {fmt.value} fires above"
            yield (what, key), _limit(check, fmt)


def _limit(check: AnyCheck, fmt: Format) -> str:
    limits = check.by_length.get(fmt)
    if limits is None:
        return f"{check.thresholds[fmt]:.6g}"
    ends = [*(f"up to {end} tokens" for end in limits.ends), "beyond"]
    return "; ".join(f"{value:.6g} {end}" for value, end in zip(limits.values, ends, strict=True))


def _listed(names: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {policy}" for name, policy in names.items())
