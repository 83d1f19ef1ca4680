"""Policies made ready to run: checks with their thresholds, rules that refer to them, and the bank that they read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from monitor.check import Check, LengthLimits
from monitor.config import Config, Policy, Rule
from monitor.gates import SteerGate, gate_of_rule
from monitor.steers import SteerPlan, compile_steers, require_clean_readings, steer_of_rule
from monitor.thresholds import RuleSite, calibrated_aggregate, own_limits, require_fitting, target_rates, thresholds_of
from monitor.types import Action, Expose, Mode, Role
from monitor.yaml_file import Place, PolicyFile
from probes.aggregate import Aggregator
from probes.artifact import Artifact
from probes.bank import Bank
from probes.card import Card, Format, Stage
from probes.detectors import load_detector
from probes.errors import did_you_mean
from probes.steering.artifact import SteerArtifact


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule whose condition is the check at position ``check`` of the plan.

    ``steer`` is the position of a steer, ``gate`` that of the gate by which the engine finds its rows in the pass
    itself; None where the scheduler has to. ``target_fpr`` is the share of benign requests for which it may fire, per
    format; empty where its threshold was stated as a number.
    """

    name: str
    check: int
    action: Action
    mode: Mode
    text: str
    steer: int | None = None
    gate: int | None = None
    target_fpr: Mapping[Format, float] = field(default_factory=dict)


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

    def uncalibrated(self, checks: Sequence[Check], fmt: Format) -> bool:
        """Whether an enforcing rule rests on a check that has no threshold for this format."""
        return any(rule.mode is Mode.ENFORCE and fmt not in checks[rule.check].thresholds for rule in self.rules)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the monitor runs on.

    Attributes:
        bank: directions and scorers of all detectors.
        checks: every statistic that is kept for a request.
        policies: by position; the first is the default.
        cards: of the detectors, by name.
        digest: SHA-256 over policy, bank and steers: equal in every process that runs the same plan.
        steering: what may be written.
    """

    bank: Bank
    checks: tuple[Check, ...]
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
    checks: list[Check] = []
    places: dict[tuple[object, ...], int] = {}

    def place(check: Check) -> int:
        key = check.key()
        if key not in places:
            places[key] = len(checks)
            checks.append(check)
        return places[key]

    steering = compile_steers(file, steer_artifacts, d_model=d_model, num_layers=num_layers)
    bank = Bank(detectors, d_model=d_model, num_layers=num_layers, capacity=config.reserve.directions)
    gates: list[SteerGate] = []
    policies = []
    for position, policy in enumerate(config.policies):
        rules = tuple(
            _compile_rule(
                file,
                ("policies", position, "rules", number),
                policy=policy,
                rule=rule,
                cards=cards,
                steering=steering,
                bank=bank,
                place=place,
                gates=gates,
            )
            for number, rule in enumerate(policy.rules)
        )
        always, asked = (
            tuple(steering.number(file, ("policies", position, key, number), name) for number, name in enumerate(names))
            for key, names in (("steers", policy.steers), ("on_request", policy.on_request))
        )
        require_clean_readings(file, ("policies", position), policy, cards, steering)
        read = {rule.when.detector for rule in policy.rules}
        watched = [place(check) for name in cards if name not in read for check in _default_checks(name, cards[name])]
        compiled = _compile_policy(policy, rules, checks, watched)
        policies.append(replace(compiled, steers=always, on_request=asked))
    digest = _digest(config, bank, checks, steering)
    steering = replace(steering, gates=tuple(gates))
    return Plan(bank, tuple(checks), tuple(policies), MappingProxyType(cards), digest, steering)


def _compile_policy(
    policy: Policy, rules: tuple[CompiledRule, ...], checks: Sequence[Check], watched: Sequence[int]
) -> CompiledPolicy:
    hold_back = policy.hold_back
    if hold_back is None:
        blocks_streams = any(
            rule.action is Action.BLOCK and rule.mode is Mode.ENFORCE and checks[rule.check].stage is Stage.STREAM
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
        checks=tuple(sorted({rule.check for rule in rules} | set(watched))),
    )


def _compile_rule(
    file: PolicyFile,
    where: Place,
    *,
    policy: Policy,
    rule: Rule,
    cards: Mapping[str, Card],
    steering: SteerPlan,
    bank: Bank,
    place: Callable[[Check], int],
    gates: list[SteerGate],
) -> CompiledRule:
    name = rule.when.detector
    if name not in cards:
        raise file.error((*where, "when", "detector"), f"is {name!r}. {did_you_mean(name, cards)}")
    site = RuleSite(file, where, rule, cards[name])
    aggregate = rule.when.aggregate or calibrated_aggregate(site)
    require_fitting(site, bank.detector(name), aggregate)
    limits, skip_first = thresholds_of(site, aggregate), site.card.skip_first
    check = Check.of(name, rule.when.stage, aggregate, skip_first=skip_first, limits=limits, segments=_segments(rule))
    steer, opened = steer_of_rule(file, where, rule, steering), None
    if steer is not None:
        found = gate_of_rule(file, where, rule, number=steer, steers=steering.steers, check=check, bank=bank)
        if found is not None:
            opened = len(gates)
            gates.append(found)
    text = rule.do.text or policy.text
    action, rates = Action(rule.do.action), target_rates(site, aggregate)
    return CompiledRule(rule.name, place(check), action, rule.mode, text, steer, opened, rates)


def _segments(rule: Rule) -> tuple[Role, ...] | None:
    named = rule.when.segments
    if named is None or rule.when.stage is not Stage.PROMPT:
        return None
    return tuple(role for role in Role if role in named)


def _default_checks(name: str, card: Card) -> list[Check]:
    """What is kept of a detector that no rule reads: its calibrated statistics, so that they can be watched."""
    grouped: dict[tuple[Stage, Aggregator], dict[Format, float | LengthLimits]] = {}
    for calibration in card.calibrations:
        known = grouped.setdefault((calibration.stage, calibration.aggregate), {})
        known[calibration.format] = own_limits(calibration)
    return [
        Check.of(name, stage, aggregate, skip_first=card.skip_first, limits=limits)
        for (stage, aggregate), limits in grouped.items()
    ]


def _digest(config: Config, bank: Bank, checks: Sequence[Check], steering: SteerPlan) -> str:
    # Thresholds and skipped positions come from the cards: neither the policy file nor the weights show a change there.
    judged = [
        [
            check.detector,
            check.stage,
            check.aggregate.config(),
            check.skip_first,
            dict(check.thresholds),
            check.segments,
            {fmt: [limits.ends, limits.values] for fmt, limits in check.by_length.items()},
        ]
        for check in checks
    ]
    # Where events are written decides nothing.
    content = json.dumps([config.model_dump(mode="json", exclude={"audit"}), judged], sort_keys=True)
    return hashlib.sha256(f"{content}\n{bank.digest()}\n{steering.digest()}".encode()).hexdigest()
