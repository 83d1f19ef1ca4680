"""Thresholds of rules: stated in the policy file, or read from the card, and only as far as the card proves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from monitor.check import LengthLimits, Limits
from monitor.config import Rule
from monitor.types import Action
from monitor.yaml_file import Place, PolicyError, PolicyFile
from probes.aggregate import Aggregator
from probes.card import Calibration, Card, Format, Stage
from probes.detectors import Detector, unfit_aggregate
from probes.threshold import ThresholdMethod, allowed_exceedances, benign_needed, threshold_for


@dataclass(frozen=True, slots=True)
class RuleSite:
    """A rule, where it stands, and the card that it reads."""

    file: PolicyFile
    where: Place
    rule: Rule
    card: Card

    def error(self, key: Place, message: str) -> PolicyError:
        """A mistake at a key of the rule."""
        return self.file.error((*self.where, *key), message)


def calibrated_aggregate(site: RuleSite) -> Aggregator:
    """The one that the card has calibrated for the rule's stage.

    Raises:
        PolicyError: there is none.
    """
    stage, card = site.rule.when.stage, site.card
    for calibration in card.calibrations:
        if calibration.stage is stage:
            return calibration.aggregate
    stages = sorted({calibration.stage.value for calibration in card.calibrations})
    raise site.error(
        ("when", "stage"),
        f"detector {card.name!r} is not calibrated for the stage {stage.value!r} (calibrated: {stages or 'none'}). "
        "Say which aggregate and threshold to use, e.g. aggregate: {kind: ema, alpha: 0.12}, above: {value: 2.0}, or "
        f"calibrate it for this stage ({_command(card, stage)}).",
    )


def require_fitting(site: RuleSite, detector: Detector, aggregate: Aggregator) -> None:
    """Refuse an aggregate that does not go with a detector, and an action that may not rest on it.

    Raises:
        PolicyError: the one or the other.
    """
    if problem := unfit_aggregate(detector, aggregate):
        raise site.error(("when", "aggregate"), f"{problem} Leave 'aggregate' out, or name that one.")
    action = site.rule.do.action
    if action.severity > Action.STEER.severity and not detector.may_block_alone:
        raise site.error(
            ("do", "action"),
            f"is {action.value!r}: {detector.name!r} is of the kind {detector.kind!r}, which finds what is unusual and "
            "not what is harmful. No request is stopped by it alone. Let the rule flag.",
        )


def thresholds_of(site: RuleSite, aggregate: Aggregator) -> Limits:
    """Above which the rule fires, for each format that it can judge.

    Raises:
        PolicyError: the card cannot give what the rule asks for.
    """
    above, stage, card = site.rule.when.above, site.rule.when.stage, site.card
    if above is not None and above.value is not None:
        return dict.fromkeys(card.formats, above.value)
    fitting = [c for c in card.calibrations if c.stage is stage and c.aggregate == aggregate]
    if not fitting:
        known = sorted({f"{calibration.aggregate} at {calibration.stage.value}" for calibration in card.calibrations})
        raise site.error(
            ("when",),
            f"detector {card.name!r} has no threshold for {aggregate} at the stage {stage.value!r} (calibrated: "
            f"{', '.join(known) or 'none'}). Add above: {{value: NUMBER}}, or calibrate it "
            f"({_command(card, stage, aggregate)}).",
        )
    if above is None:
        return {calibration.format: _own_threshold(site, calibration) for calibration in fitting}
    target = above.target_fpr
    if target is None:  # pragma: no cover - the model allows exactly one of the two
        raise AssertionError("above has neither value nor target_fpr")
    return {calibration.format: _certified(site, calibration, target) for calibration in fitting}


def target_rates(site: RuleSite, aggregate: Aggregator) -> Mapping[Format, float]:
    """The share of benign requests for which the rule may fire, per format; empty where its threshold is a number."""
    above = site.rule.when.above
    if above is not None and above.value is not None:
        return {}
    stage = site.rule.when.stage
    fitting = [c for c in site.card.calibrations if c.stage is stage and c.aggregate == aggregate]
    asked = above.target_fpr if above is not None else None
    return {c.format: c.target_fpr if asked is None else asked for c in fitting}


def own_limits(calibration: Calibration) -> float | LengthLimits:
    """The card's own threshold, or thresholds by length."""
    if not calibration.buckets:
        return calibration.threshold
    return _by_length(calibration, [bucket.threshold for bucket in calibration.buckets])


def _by_length(calibration: Calibration, values: Sequence[float]) -> LengthLimits:
    ends = (bucket.max_tokens for bucket in calibration.buckets)
    return LengthLimits(tuple(end for end in ends if end is not None), tuple(values))


def _own_threshold(site: RuleSite, calibration: Calibration) -> float | LengthLimits:
    """The card's threshold; one whose rate is not proved may only flag."""
    if calibration.buckets:
        certified = all(bucket.certified for bucket in calibration.buckets)
    else:
        certified = calibration.certified
    if certified or site.rule.do.action is Action.FLAG:
        return own_limits(calibration)
    if calibration.method is ThresholdMethod.CONFORMAL:
        why = (
            f"It is conformal: right in the mean over calibrations, without a confidence for this one. Let the rule "
            f"flag, state above: {{target_fpr: {calibration.target_fpr:g}}}, which is read with a confidence, or "
            "calibrate with --method pac."
        )
    else:
        needed = benign_needed(calibration.target_fpr, confidence=calibration.confidence)
        why = (
            f"Its {calibration.num_benign} benign requests do not prove a rate of {calibration.target_fpr} at "
            f"{calibration.confidence:.0%} confidence, {needed} would. Let the rule flag, calibrate on more requests "
            f"({_command(site.card, calibration.stage, calibration.aggregate)}), or state above: {{value: NUMBER}}."
        )
    raise site.error(
        ("do", "action"),
        f"is {site.rule.do.action.value!r}: the threshold of {site.card.name!r} for {calibration.format.value} at the "
        f"stage {calibration.stage.value!r} is not certified. {why}",
    )


def _command(card: Card, stage: Stage, aggregate: Aggregator | None = None) -> str:
    """How the card's artifact is calibrated for a statistic."""
    command = f"telltale calibrate {card.name}.safetensors --benign FILE.jsonl --stage {stage.value}"
    if aggregate is None:
        return command
    fields = aggregate.config()
    parameters = "".join(f",{key}={value}" for key, value in fields.items() if key != "kind")
    return f"{command} --aggregate {aggregate.kind}{parameters}"


def _certified(site: RuleSite, calibration: Calibration, target: float) -> float | LengthLimits:
    """The threshold for a rate that the rule asks for: by length, if all lengths can prove it."""
    confidence = calibration.confidence
    found = [
        threshold_for(bucket.top_scores, bucket.num_benign, target, confidence=confidence)
        for bucket in calibration.buckets
    ]
    proved = [value for value in found if value is not None]
    if proved and len(proved) == len(found):
        return _by_length(calibration, proved)
    threshold = threshold_for(calibration.top_scores, calibration.num_benign, target, confidence=confidence)
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
        f"confidence: {missing} more are needed. Ask for a larger rate, calibrate on more requests "
        f"({_command(site.card, calibration.stage, calibration.aggregate)}), or let the rule only flag.",
    )
