"""Policies made ready to run: checks with their thresholds, rules that refer to them, and the bank that they read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from monitor.check import Check
from monitor.condition import Condition, Verdict, verdicts_of
from monitor.config import Config, Policy
from monitor.gates import SteerGate, gate_of_rule
from monitor.rollout import Share, Subjects
from monitor.rule import Rule, Scope
from monitor.steers import SteerPlan, compile_steers, require_clean_readings, steer_of_rule
from monitor.types import Action, Expose, Mode
from monitor.verdicts import AnyCheck, Verdicts
from monitor.weighed import WeighedCheck
from monitor.yaml_file import Place, PolicyFile
from probes.artifact import Artifact
from probes.bank import Bank
from probes.card import Card, Format, Stage
from probes.detectors import load_detector
from probes.steering.artifact import SteerArtifact


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule whose condition rests on checks of the plan, by their positions.

    ``steer`` is the position of a steer, ``gate`` that of the gate by which the engine finds its rows in the pass
    itself; None where the scheduler has to. ``share`` says for whom it is enforced; None for everybody. ``scope``
    is of a block.
    """

    name: str
    condition: Condition
    action: Action
    mode: Mode
    text: str
    steer: int | None = None
    gate: int | None = None
    share: Share | None = None
    scope: Scope = Scope.CHOICE

    @property
    def verdicts(self) -> tuple[int, ...]:
        """The checks that say whether it fires."""
        return tuple(number for number, _ in verdicts_of(self.condition))

    @property
    def check(self) -> int | None:
        """The check that alone says whether it fires; None if several do, or one does that is negated."""
        return self.condition.number if isinstance(self.condition, Verdict) else None

    def rests_on(self, stage: Stage, checks: Sequence[AnyCheck]) -> bool:
        """Whether one of its verdicts is of a stage."""
        return any(checks[number].stage is stage for number in self.verdicts)

    def waits_for_prompt(self, checks: Sequence[AnyCheck]) -> bool:
        """Whether it may become true by what does not fire when the prompt is through."""
        return any(negated and checks[number].stage is Stage.PROMPT for number, negated in verdicts_of(self.condition))

    def waits_for_end(self, checks: Sequence[AnyCheck]) -> bool:
        """Whether it may become true only when the reply has ended."""
        return any(
            checks[number].stage is Stage.RESPONSE or (negated and checks[number].stage is Stage.STREAM)
            for number, negated in verdicts_of(self.condition)
        )


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A policy whose rules point into the plan's checks.

    ``steers``, those of every request, and ``on_request``, those that one may ask for, point into its steers.
    """

    name: str
    on_gap: Action
    on_uncalibrated: Action
    hold_back: int
    expose: Expose
    text: str
    rules: tuple[CompiledRule, ...]
    checks: tuple[int, ...]
    steers: tuple[int, ...] = ()
    on_request: tuple[int, ...] = ()

    @property
    def blocks_requests(self) -> bool:
        """Whether a rule may block all choices of a request for one of them."""
        return any(rule.scope is Scope.REQUEST for rule in self.rules)

    def outside(self, key: bytes, subjects: Subjects) -> frozenset[str]:
        """Names of the rules that are enforced for others than these, and run in shadow for them."""
        return frozenset(
            rule.name
            for rule in self.rules
            if rule.share is not None and not rule.share.holds(key, rule.name, subjects)
        )

    def uncalibrated(self, checks: Sequence[AnyCheck], fmt: Format, outside: Collection[str] = frozenset()) -> bool:
        """Whether a rule that is enforced rests on a check that has no threshold for this format.

        Args:
            checks: of the plan.
            fmt: of the request.
            outside: names of rules that are not enforced for it.
        """
        return any(
            rule.mode is Mode.ENFORCE
            and rule.name not in outside
            and any(fmt not in checks[number].thresholds for number in rule.verdicts)
            for rule in self.rules
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the monitor runs on.

    Attributes:
        bank: directions and scorers of all detectors.
        checks: every statistic that is kept for a request, and every weighted sum of some.
        policies: by position; the first is the default.
        cards: of the detectors, by name.
        digest: SHA-256 over policy, bank and steers: equal in every process that runs the same plan.
        steering: what may be written.
    """

    bank: Bank
    checks: tuple[AnyCheck, ...]
    policies: tuple[CompiledPolicy, ...]
    cards: Mapping[str, Card]
    digest: str
    steering: SteerPlan


def compile_plan(
    file: PolicyFile,
    artifacts: Mapping[str, Artifact],
    steer_artifacts: Mapping[str, SteerArtifact] = MappingProxyType({}),
    *,
    d_model: int,
    num_layers: int,
) -> Plan:
    """Join a policy file and its artifacts.

    Args:
        file: the validated policy file.
        artifacts: of the detectors, by the name that the file's rules use.
        steer_artifacts: of the steers, by the steer's name.
        d_model: width of the served model's residual stream.
        num_layers: its decoder layers.
    Raises:
        PolicyError: a rule names an unknown detector or steer, or asks for a threshold that the card cannot give.
        probes.bank.BankError: the directions do not fit the model or the reserved room.
    """
    config = file.config
    detectors = [load_detector(artifact, name=name) for name, artifact in artifacts.items()]
    cards = {name: artifact.card for name, artifact in artifacts.items()}
    steering = compile_steers(file, steer_artifacts, d_model=d_model, num_layers=num_layers)
    bank = Bank(detectors, d_model=d_model, num_layers=num_layers, capacity=config.reserve.directions)
    verdicts = Verdicts(file, cards, bank)
    gates: list[SteerGate] = []
    policies = []
    for position, policy in enumerate(config.policies):
        rules = tuple(
            _compile_rule(
                file,
                ("policies", position, "rules", number),
                policy=policy,
                rule=rule,
                verdicts=verdicts,
                steering=steering,
                bank=bank,
                gates=gates,
            )
            for number, rule in enumerate(policy.rules)
        )
        always, asked = (
            tuple(steering.number(file, ("policies", position, key, number), name) for number, name in enumerate(names))
            for key, names in (("steers", policy.steers), ("on_request", policy.on_request))
        )
        require_clean_readings(file, ("policies", position), policy, cards, steering)
        kept = {number for rule in rules for number in verdicts.read_by(rule.condition)}
        read = {name for number in kept for name in verdicts.detectors_of(number)}
        kept |= {number for name in cards if name not in read for number in verdicts.watched(name)}
        compiled = _compile_policy(policy, rules, verdicts.checks, kept)
        policies.append(replace(compiled, steers=always, on_request=asked))
    digest = _digest(config, bank, verdicts.checks, steering)
    steering = replace(steering, gates=tuple(gates))
    return Plan(bank, tuple(verdicts.checks), tuple(policies), MappingProxyType(cards), digest, steering)


def _compile_policy(
    policy: Policy, rules: tuple[CompiledRule, ...], checks: Sequence[AnyCheck], kept: Collection[int]
) -> CompiledPolicy:
    hold_back = policy.hold_back
    if hold_back is None:
        blocks_streams = any(
            rule.action is Action.BLOCK and rule.mode is Mode.ENFORCE and rule.rests_on(Stage.STREAM, checks)
            for rule in rules
        )
        hold_back = 1 if blocks_streams else 0
    return CompiledPolicy(
        name=policy.name,
        on_gap=policy.on_gap,
        on_uncalibrated=policy.on_uncalibrated,
        hold_back=hold_back,
        expose=policy.expose,
        text=policy.text,
        rules=rules,
        checks=tuple(sorted(kept)),
    )


def _compile_rule(
    file: PolicyFile,
    where: Place,
    *,
    policy: Policy,
    rule: Rule,
    verdicts: Verdicts,
    steering: SteerPlan,
    bank: Bank,
    gates: list[SteerGate],
) -> CompiledRule:
    condition = verdicts.condition(where, rule)
    steer, opened = steer_of_rule(file, where, rule, steering), None
    if steer is not None:
        check = verdicts.checks[condition.number] if isinstance(condition, Verdict) else None
        alone = check if isinstance(check, Check) else None
        found = gate_of_rule(file, where, rule, number=steer, steers=steering.steers, check=alone, bank=bank)
        if found is not None:
            opened = len(gates)
            gates.append(found)
    return CompiledRule(
        name=rule.name,
        condition=condition,
        action=Action(rule.do.action),
        mode=rule.mode,
        text=rule.do.text or policy.text,
        steer=steer,
        gate=opened,
        share=Share(rule.rollout.percent, rule.rollout.by) if rule.rollout is not None else None,
        scope=rule.do.scope or Scope.CHOICE,
    )


def _digest(config: Config, bank: Bank, checks: Sequence[AnyCheck], steering: SteerPlan) -> str:
    # Thresholds and skipped positions come from the cards: neither the policy file nor the weights show a change there.
    judged = [_judged(check) for check in checks]
    content = json.dumps([config.model_dump(mode="json"), judged], sort_keys=True)
    return hashlib.sha256(f"{content}\n{bank.digest()}\n{steering.digest()}".encode()).hexdigest()


def _judged(check: AnyCheck) -> list[object]:
    """All that says when a check fires, as JSON."""
    if isinstance(check, WeighedCheck):
        terms = [
            [term.check, term.weight, {fmt: [item.slope, item.intercept] for fmt, item in (term.scaling or {}).items()}]
            for term in check.terms
        ]
        return [check.stage, check.statistic, terms, dict(check.thresholds)]
    return [
        check.detector,
        check.stage,
        check.aggregate.config(),
        check.skip_first,
        dict(check.thresholds),
        check.segments,
        {fmt: [limits.ends, limits.values] for fmt, limits in check.by_length.items()},
    ]
