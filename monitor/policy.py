"""Policies made ready to run: checks with their thresholds, rules that refer to them, and the bank that they read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from pydantic.main import IncEx

from monitor.attempt import DEFERRED, Holds
from monitor.card_segments import card_segments
from monitor.check import Check
from monitor.compiled import CompiledPolicy, CompiledRule
from monitor.condition import Condition, Verdict, verdicts_of
from monitor.config import Config, Policy
from monitor.duration import seconds_of
from monitor.flag_alert import FlagAlert, flag_alerts
from monitor.gates import SteerGate, gate_of_rule
from monitor.handling import DEFAULT_TIMEOUT, Handling
from monitor.rollout import Share
from monitor.rule import Rule, Scope
from monitor.sinks.names import require_known_names
from monitor.steers import SteerPlan, compile_steers, require_clean_readings, steer_of_rule
from monitor.strictest import strictest
from monitor.tenants import CompiledTenant, compile_tenants, variants
from monitor.types import Action, Mode
from monitor.verdicts import AnyCheck, Verdicts
from monitor.weighed import WeighedCheck
from monitor.yaml_file import Place, PolicyError, PolicyFile
from probes.artifact import Artifact
from probes.bank import Bank
from probes.card import Calibration, Card, Format, Stage
from probes.columns import Room
from probes.detectors import load_detector
from probes.steering.steer import Steerable


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the monitor runs on.

    Attributes:
        bank: directions and scorers of all detectors.
        checks: every statistic that is kept for a request, and every weighted sum of some.
        policies: by position; the first is that of requests whose front end names none.
        cards: of the detectors, by name.
        digest: SHA-256 over policy, bank and steers: equal in every process that runs the same plan.
        steering: what may be written.
        tenants: by the SHA-256 of their API keys.
        strictest: position of the policy of requests that nobody vouches for.
        alerts: whom flagged requests wake; decides nothing.
        on_session_failure: what is done about a request while nobody can tell what its session has been like.
    """

    bank: Bank
    checks: tuple[AnyCheck, ...]
    policies: tuple[CompiledPolicy, ...]
    cards: Mapping[str, Card]
    digest: str
    steering: SteerPlan
    tenants: Mapping[str, CompiledTenant] = field(default_factory=lambda: MappingProxyType({}))
    strictest: int = 0
    alerts: tuple[FlagAlert, ...] = ()
    on_session_failure: Action = Action.ALLOW

    @property
    def is_rolled_out(self) -> bool:
        """Whether some rule is enforced for a share of requests only."""
        return any(rule.share is not None for policy in self.policies for rule in policy.rules)

    def probability(self, position: int, fmt: Format, statistic: float) -> float | None:
        """The probability that a check's statistic means, as its detector's card says it.

        Args:
            position: of the check.
            fmt: of the request.
            statistic: finite.
        Returns: None where the card has no Platt scaling for this stage, format and aggregate, over the same text.
        """
        found = (item.platt for item in self.calibrations(position) if item.format is fmt)
        platt = next(found, None)
        return None if platt is None else platt.probability(statistic)

    def calibrations(self, position: int) -> tuple[Calibration, ...]:
        """What a card has calibrated of the very statistic of a check, per format; nothing of a weighted sum.

        Args:
            position: of the check.
        """
        check = self.checks[position]
        if isinstance(check, WeighedCheck):
            return ()
        card = self.cards[check.detector]
        if check.segments != card_segments(card):
            return ()
        return tuple(
            item for item in card.calibrations if (item.stage, item.aggregate) == (check.stage, check.aggregate)
        )


def compile_plan(
    file: PolicyFile,
    artifacts: Mapping[str, Artifact],
    steer_artifacts: Mapping[str, Steerable] = MappingProxyType({}),
    *,
    d_model: int,
    num_layers: int,
    room: Room | None = None,
) -> Plan:
    """Join a policy file and its artifacts.

    Args:
        file: the validated policy file.
        artifacts: of the detectors, by the name that the file's rules use.
        steer_artifacts: of the steers, by the steer's name.
        d_model: width of the served model's residual stream.
        num_layers: its decoder layers.
        room: of the engine that runs already; None before it starts.
    Raises:
        PolicyError: a rule names an unknown detector or steer, or asks for a threshold that the card cannot give.
        probes.bank.BankError: the directions do not fit the model or the reserved room.
        probes.columns.NoRoomError: they do not fit into the engine that runs.
    """
    config = file.config
    detectors = [load_detector(artifact, name=name) for name, artifact in artifacts.items()]
    cards = {name: artifact.card for name, artifact in artifacts.items()}
    require_known_names(file, cards)
    steering = compile_steers(file, steer_artifacts, d_model=d_model, num_layers=num_layers)
    bank = Bank(detectors, d_model=d_model, num_layers=num_layers, capacity=config.reserve.directions, room=room)
    verdicts = Verdicts(file, cards, bank)
    parts = _Parts(file, verdicts, steering)
    policies: list[CompiledPolicy] = []
    for variant in variants(file):
        try:
            compiled = _compile_policy(parts, variant.where, variant.policy)
        except PolicyError as error:
            if variant.tenant is None:
                raise
            # What stands in the file was sound: the mistake is among the thresholds.
            raise file.error(("tenants", variant.tenant, "above"), f"with these thresholds: {error}") from error
        require_clean_readings(file, variant.where, variant.policy, cards, steering)
        policies.append(compiled)
    if len(policies) > 1:
        policies.append(strictest(policies))
    kept = [verdicts.checks[number] for policy in policies for number in policy.checks]
    alerts = flag_alerts(file, artifacts, [check for check in kept if isinstance(check, Check)])
    return Plan(
        bank=bank,
        checks=tuple(verdicts.checks),
        policies=tuple(policies),
        cards=MappingProxyType(cards),
        digest=_digest(config, bank, verdicts.checks, steering, cards),
        steering=replace(steering, gates=tuple(parts.gates)),
        tenants=compile_tenants(config.tenants),
        strictest=len(policies) - 1,
        alerts=alerts,
        on_session_failure=Action(config.sessions.on_failure or Action.ALLOW),
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    """What all rules of a file are made of, and the gates that were found so far."""

    file: PolicyFile
    verdicts: Verdicts
    steering: SteerPlan
    gates: list[SteerGate] = field(default_factory=list)


def _compile_policy(parts: _Parts, where: Place, policy: Policy) -> CompiledPolicy:
    file, verdicts, steering = parts.file, parts.verdicts, parts.steering
    rules = tuple(
        _compile_rule(parts, (*where, "rules", number), policy, rule) for number, rule in enumerate(policy.rules)
    )
    always, asked = (
        tuple(steering.number(file, (*where, key, number), name) for number, name in enumerate(names))
        for key, names in (("steers", policy.steers), ("on_request", policy.on_request))
    )
    kept = {number for rule in rules for number in verdicts.read_by(rule.condition)}
    probes = (rule.handling.probe for rule in rules if rule.handling is not None)
    kept |= {number for probe in probes if probe is not None for number in verdicts.read_by(probe)}
    kept |= {rule.conversation.check for rule in rules if rule.conversation is not None}
    read = {name for number in kept for name in verdicts.detectors_of(number)}
    kept |= {
        number
        for detector in verdicts.bank.detectors
        if detector.name not in read
        for number in verdicts.watched(detector.name)
    }
    hold_back = policy.hold_back
    if hold_back is None:
        blocks_streams = any(
            rule.action is Action.BLOCK and rule.mode is Mode.ENFORCE and rule.rests_on(Stage.STREAM, verdicts.checks)
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
        steers=always,
        on_request=asked,
        quantise=policy.quantise,
        probing=policy.probing,
    )


def _compile_rule(parts: _Parts, where: Place, policy: Policy, rule: Rule) -> CompiledRule:
    file, verdicts, steering, gates = parts.file, parts.verdicts, parts.steering, parts.gates
    condition = verdicts.condition(where, rule)
    steer, opened = steer_of_rule(file, where, rule, steering), None
    handling = _handling(rule, verdicts.second(where, rule), steer)
    if rule.do.action is not Action.STEER:
        steer = None
    conversation = verdicts.conversation(where, policy.name, rule)
    if steer is not None and conversation is None:
        check = verdicts.checks[condition.number] if isinstance(condition, Verdict) else None
        alone = check if isinstance(check, Check) else None
        found = gate_of_rule(file, where, rule, number=steer, steers=steering.steers, check=alone, bank=verdicts.bank)
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
        target_fpr=verdicts.target_rates(rule, condition),
        handling=handling,
        holds=_holds(rule, condition, verdicts),
        conversation=conversation,
    )


def _handling(rule: Rule, probe: Condition | None, steer: int | None) -> Handling | None:
    if rule.do.action not in DEFERRED:
        return None
    timeout = seconds_of(rule.do.timeout or DEFAULT_TIMEOUT)
    return Handling(rule.do, timeout, rule.do.budget, probe, steer)


def _holds(rule: Rule, condition: Condition, verdicts: Verdicts) -> Holds:
    """How long replies are withheld because of a rule."""
    read = [(verdicts.checks[number].stage, negated) for number, negated in verdicts_of(condition)]
    if rule.mode is not Mode.ENFORCE:
        return Holds.NOTHING
    if rule.do.action in DEFERRED:
        return Holds.PROMPT if all(stage is Stage.PROMPT for stage, _ in read) else Holds.REPLY
    late = any(stage is Stage.RESPONSE or (negated and stage is Stage.STREAM) for stage, negated in read)
    return Holds.REPLY if late and rule.do.action is Action.BLOCK else Holds.NOTHING


def _digest(
    config: Config, bank: Bank, checks: Sequence[AnyCheck], steering: SteerPlan, cards: Mapping[str, Card]
) -> str:
    # Thresholds and skipped positions come from the cards: neither the policy file nor the weights show a change there.
    # What a kind computes behind the directions stands in its other tensors and its parameters.
    judged = [_judged(check) for check in checks]
    made = {name: [card.tensors_digest, card.parameters] for name, card in cards.items()}
    # Where events go and sessions are remembered, whom they wake, and who is let in, decides nothing.
    alert: IncEx = {"__all__": {"alert"}}
    elsewhere = dict.fromkeys(("access", "audit", "sessions", "sinks"), True)
    untold: IncEx = {**elsewhere, "detectors": alert, "policies": {"__all__": {"rules": alert}}}
    content = json.dumps([config.model_dump(mode="json", exclude=untold), judged, made], sort_keys=True)
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
