"""Policies made ready to run: checks with their thresholds, rules that refer to them, and the bank that they read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from monitor.config import Config, Policy, Rule
from monitor.steers import SteerPlan, compile_steers, require_clean_readings, steer_of_rule
from monitor.types import Action, Expose, Mode, Role
from monitor.yaml_file import Place, PolicyError, PolicyFile
from probes.aggregate import Aggregator
from probes.artifact import Artifact
from probes.bank import Bank
from probes.card import Calibration, Card, Format, Stage
from probes.detectors import load_detector
from probes.errors import did_you_mean
from probes.steering.artifact import SteerArtifact
from probes.threshold import allowed_exceedances, benign_needed, threshold_for


@dataclass(frozen=True, slots=True)
class Check:
    """One statistic and when it fires.

    Attributes:
        detector: name of the detector whose scores are aggregated.
        stage: when the statistic is judged.
        aggregate: how scores become the statistic.
        skip_first: leading positions that are not read (the card's sink).
        thresholds: per format; a format that is missing is not calibrated.
        segments: the roles that are read, in the order of ``Role``; None reads everything. Only of a prompt: a reply is
            one segment.
    """

    detector: str
    stage: Stage
    aggregate: Aggregator
    skip_first: int
    thresholds: Mapping[Format, float]
    segments: tuple[Role, ...] | None = None

    def key(self) -> tuple[object, ...]:
        """What makes two checks the same."""
        thresholds = tuple(sorted(self.thresholds.items()))
        return (self.detector, self.stage, self.aggregate, self.skip_first, thresholds, self.segments)


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule whose condition is the check at position ``check`` of the plan; ``steer`` is the position of a steer."""

    name: str
    check: int
    action: Action
    mode: Mode
    text: str
    steer: int | None = None


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
                place=place,
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
    bank = Bank(detectors, d_model=d_model, num_layers=num_layers, capacity=config.reserve.directions)
    digest = _digest(config, bank, checks, steering)
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


@dataclass(frozen=True, slots=True)
class _Site:
    """A rule, where it stands, and the card that it reads."""

    file: PolicyFile
    where: Place
    rule: Rule
    card: Card

    def error(self, key: Place, message: str) -> PolicyError:
        return self.file.error((*self.where, *key), message)


def _compile_rule(
    file: PolicyFile,
    where: Place,
    *,
    policy: Policy,
    rule: Rule,
    cards: Mapping[str, Card],
    steering: SteerPlan,
    place: Callable[[Check], int],
) -> CompiledRule:
    name = rule.when.detector
    if name not in cards:
        raise file.error((*where, "when", "detector"), f"is {name!r}. {did_you_mean(name, cards)}")
    site = _Site(file, where, rule, cards[name])
    aggregate = rule.when.aggregate or _calibrated_aggregate(site)
    thresholds = MappingProxyType(_thresholds(site, aggregate))
    segments = _segments(rule)
    check = place(Check(name, rule.when.stage, aggregate, site.card.skip_first, thresholds, segments))
    steer = steer_of_rule(file, where, rule, steering)
    return CompiledRule(rule.name, check, Action(rule.do.action), rule.mode, rule.do.text or policy.text, steer)


def _segments(rule: Rule) -> tuple[Role, ...] | None:
    named = rule.when.segments
    if named is None or rule.when.stage is not Stage.PROMPT:
        return None
    return tuple(role for role in Role if role in named)


def _calibrated_aggregate(site: _Site) -> Aggregator:
    stage, card = site.rule.when.stage, site.card
    for calibration in card.calibrations:
        if calibration.stage is stage:
            return calibration.aggregate
    stages = sorted({calibration.stage.value for calibration in card.calibrations})
    raise site.error(
        ("when", "stage"),
        f"detector {card.name!r} is not calibrated for the stage {stage.value!r} (calibrated: {stages or 'none'}). "
        "Say which aggregate and threshold to use, e.g. aggregate: {kind: ema, alpha: 0.12}, above: {value: 2.0}, or "
        "calibrate it for this stage (telltale train).",
    )


def _thresholds(site: _Site, aggregate: Aggregator) -> dict[Format, float]:
    above, stage, card = site.rule.when.above, site.rule.when.stage, site.card
    if above is not None and above.value is not None:
        return dict.fromkeys(card.formats, above.value)
    fitting = [c for c in card.calibrations if c.stage is stage and c.aggregate == aggregate]
    if not fitting:
        known = sorted({f"{calibration.aggregate} at {calibration.stage.value}" for calibration in card.calibrations})
        raise site.error(
            ("when",),
            f"detector {card.name!r} has no threshold for {aggregate} at the stage {stage.value!r} (calibrated: "
            f"{', '.join(known) or 'none'}). Add above: {{value: NUMBER}}, or calibrate it (telltale train).",
        )
    if above is None:
        return {calibration.format: _own_threshold(site, calibration) for calibration in fitting}
    target = above.target_fpr
    if target is None:  # pragma: no cover - the model allows exactly one of the two
        raise AssertionError("above has neither value nor target_fpr")
    return {calibration.format: _certified(site, calibration, target) for calibration in fitting}


def _own_threshold(site: _Site, calibration: Calibration) -> float:
    """The card's threshold; one whose rate is not proved may only flag."""
    if calibration.certified or site.rule.do.action is Action.FLAG:
        return calibration.threshold
    needed = benign_needed(calibration.target_fpr, confidence=calibration.confidence)
    raise site.error(
        ("do", "action"),
        f"is {site.rule.do.action.value!r}: the threshold of {site.card.name!r} for {calibration.format.value} at the "
        f"stage {calibration.stage.value!r} is not certified. Its {calibration.num_benign} benign requests do not "
        f"prove a rate of {calibration.target_fpr} at {calibration.confidence:.0%} confidence, {needed} would. Let the "
        "rule flag, calibrate on more requests, or state above: {value: NUMBER}.",
    )


def _certified(site: _Site, calibration: Calibration, target: float) -> float:
    threshold = threshold_for(calibration.top_scores, calibration.num_benign, target, confidence=calibration.confidence)
    if threshold is not None:
        return threshold
    place = ("when", "above", "target_fpr")
    allowed = allowed_exceedances(calibration.num_benign, target, confidence=calibration.confidence)
    if allowed is not None:
        raise site.error(
            place,
            f"is {target}: the card of {site.card.name!r} keeps the {len(calibration.top_scores)} largest benign "
            f"statistics, this rate needs {allowed + 1}. Ask for a smaller rate, or state above: {{value: NUMBER}}.",
        )
    if site.rule.do.action is Action.FLAG:
        return calibration.top_scores[0]
    missing = benign_needed(target, confidence=calibration.confidence) - calibration.num_benign
    raise site.error(
        place,
        f"is {target}, which {calibration.num_benign} benign requests cannot certify at {calibration.confidence:.0%} "
        f"confidence: {missing} more are needed. Ask for a larger rate, calibrate on more requests, or let the rule "
        "only flag.",
    )


def _default_checks(name: str, card: Card) -> list[Check]:
    """What is kept of a detector that no rule reads: its calibrated statistics, so that they can be watched."""
    grouped: dict[tuple[Stage, Aggregator], dict[Format, float]] = {}
    for calibration in card.calibrations:
        grouped.setdefault((calibration.stage, calibration.aggregate), {})[calibration.format] = calibration.threshold
    return [
        Check(name, stage, aggregate, card.skip_first, MappingProxyType(thresholds))
        for (stage, aggregate), thresholds in grouped.items()
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
        ]
        for check in checks
    ]
    content = json.dumps([config.model_dump(mode="json"), judged], sort_keys=True)
    return hashlib.sha256(f"{content}\n{bank.digest()}\n{steering.digest()}".encode()).hexdigest()
