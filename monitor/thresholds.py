"""Thresholds of rules: stated in the policy file, or read from the card, and only as far as the card proves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from monitor.config import Rule
from monitor.types import Action
from monitor.yaml_file import Place, PolicyError, PolicyFile
from probes.aggregate import Aggregator
from probes.card import Calibration, Card, Format
from probes.detectors import Detector, unfit_aggregate
from probes.threshold import allowed_exceedances, benign_needed, threshold_for


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
        "calibrate it for this stage (telltale train).",
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


def thresholds_of(site: RuleSite, aggregate: Aggregator) -> Mapping[Format, float]:
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
            f"{', '.join(known) or 'none'}). Add above: {{value: NUMBER}}, or calibrate it (telltale train).",
        )
    if above is None:
        return {calibration.format: _own_threshold(site, calibration) for calibration in fitting}
    target = above.target_fpr
    if target is None:  # pragma: no cover - the model allows exactly one of the two
        raise AssertionError("above has neither value nor target_fpr")
    return {calibration.format: _certified(site, calibration, target) for calibration in fitting}


def _own_threshold(site: RuleSite, calibration: Calibration) -> float:
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


def _certified(site: RuleSite, calibration: Calibration, target: float) -> float:
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
