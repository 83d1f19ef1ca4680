"""Thresholds of rules: stated in the policy file, or read from the card, and only as far as the card proves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from monitor.check import Check, LengthLimits, Limits
from monitor.entries import DetectorEntry
from monitor.rule import Rule
from monitor.types import Action
from monitor.weighed import Logistic
from monitor.when import Above
from monitor.yaml_file import Place, PolicyError, PolicyFile
from probes.aggregate import Aggregator
from probes.aggregate.max import Max
from probes.card import Calibration, Card, Format, Stage
from probes.detectors import Detector, unfit_aggregate
from probes.threshold import ThresholdMethod, allowed_exceedances, benign_needed, threshold_for


@dataclass(frozen=True, slots=True)
class RuleSite:
    """A verdict of a rule, where both stand, and the card that it reads.

    Attributes:
        file: the policy file.
        where: the rule stands.
        rule: it.
        path: the keys that lead from the rule to what reads the detector.
        stage: when it is judged.
        card: of the detector.
        latents: the entry of the policy file that names them, where it is no artifact that is read.
    """

    file: PolicyFile
    where: Place
    rule: Rule
    path: Place
    stage: Stage
    card: Card
    latents: DetectorEntry | None = None

    def error(self, key: Place, message: str) -> PolicyError:
        """A mistake at a key of the verdict."""
        return self.file.error((*self.where, *self.path, *key), message)

    def error_in_action(self, message: str) -> PolicyError:
        """A mistake in what the rule does."""
        return self.file.error((*self.where, "do", "action"), message)


def calibrated_aggregate(site: RuleSite) -> Aggregator:
    """The one that the card has calibrated for the rule's stage.

    Raises:
        PolicyError: there is none.
    """
    stage, card = site.stage, site.card
    if site.latents is not None:
        return site.latents.aggregate or Max()
    for calibration in card.calibrations:
        if calibration.stage is stage:
            return calibration.aggregate
    stages = sorted({calibration.stage.value for calibration in card.calibrations})
    raise site.error(
        ("stage",),
        f"detector {card.name!r} is not calibrated for the stage {stage.value!r} (calibrated: {stages or 'none'}). "
        "Say which aggregate and threshold to use, e.g. aggregate: {kind: ema, alpha: 0.12}, above: {value: 2.0}, or "
        f"calibrate it for this stage ({_command(card, stage)}).",
    )


def term_aggregate(site: RuleSite) -> Aggregator:
    """The aggregate of a sum or a conversation that names none: the one that the card has calibrated.

    Raises:
        PolicyError: there is none.
    """
    if site.latents is not None:
        return site.latents.aggregate or Max()
    for calibration in site.card.calibrations:
        if calibration.stage is site.stage:
            return calibration.aggregate
    raise site.error(
        ("detector",),
        f"is {site.card.name!r}, which is not calibrated for the stage {site.stage.value!r}: say which aggregate to "
        "use, e.g. aggregate: {kind: mean}.",
    )


def scaling_of(site: RuleSite, aggregate: Aggregator) -> Mapping[Format, Logistic]:
    """How a statistic becomes a probability, for each format in which the card says it.

    Raises:
        PolicyError: it says so in none.
    """
    found = {
        calibration.format: Logistic(calibration.platt.slope, calibration.platt.intercept)
        for calibration in site.card.calibrations
        if calibration.stage is site.stage and calibration.aggregate == aggregate and calibration.platt is not None
    }
    if not found:
        raise site.error(
            ("detector",),
            f"is {site.card.name!r}, whose card does not say how {aggregate} at the stage {site.stage.value!r} becomes "
            f"a probability. Use sum: statistic, or fit it ({_command(site.card, site.stage, aggregate)} with labelled "
            "requests, see telltale calibrate --help).",
        )
    return MappingProxyType(found)


def require_fitting(site: RuleSite, detector: Detector, aggregate: Aggregator) -> None:
    """Refuse an aggregate that does not go with a detector.

    Raises:
        PolicyError: it does not.
    """
    if problem := unfit_aggregate(detector, aggregate):
        raise site.error(("aggregate",), f"{problem} Leave 'aggregate' out, or name that one.")


def thresholds_of(site: RuleSite, aggregate: Aggregator, above: Above | None) -> Limits:
    """Above which the statistic fires, for each format that it can be judged in.

    Raises:
        PolicyError: the card cannot give what the rule asks for.
    """
    stage, card, stated = site.stage, site.card, above
    if above is None and site.latents is not None:
        above = site.latents.threshold
    if above is not None and above.value is not None:
        return dict.fromkeys(card.formats, above.value)
    if site.latents is not None:
        raise _not_calibrated(site, site.latents, stated)
    fitting = [c for c in card.calibrations if c.stage is stage and c.aggregate == aggregate]
    if not fitting:
        known = sorted({f"{calibration.aggregate} at {calibration.stage.value}" for calibration in card.calibrations})
        raise site.error(
            (),
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


def target_rates(card: Card, check: Check, above: Above | None) -> Mapping[Format, float]:
    """The share of benign requests that may exceed a threshold, per format; empty where it is stated as a number."""
    if above is not None and above.value is not None:
        return {}
    asked = above.target_fpr if above is not None else None
    return {
        calibration.format: calibration.target_fpr if asked is None else asked
        for calibration in card.calibrations
        if calibration.stage is check.stage and calibration.aggregate == check.aggregate
    }


def _not_calibrated(site: RuleSite, entry: DetectorEntry, stated: Above | None) -> PolicyError:
    """Latents that stand in the policy file have no card that a calibration could be written to."""
    numbers = ",".join(map(str, entry.latents or ()))
    name = site.card.name
    make = f"telltale sae detector {entry.sae} --latents {numbers} --combine {entry.combined.value} --name {name}"
    advice = (
        f"State a value, e.g. threshold: {{value: 3.2}}; or make a detector of them ({make}), calibrate it (telltale "
        f"calibrate detectors/{name}.safetensors --benign FILE.jsonl --stage {site.stage.value}) and name it "
        "with 'artifact'."
    )
    if stated is not None:
        return site.error(("above", "target_fpr"), f"latents in a policy file are not calibrated. {advice}")
    number = site.file.config.detectors.index(entry)
    if entry.threshold is not None:
        where: Place = ("detectors", number, "threshold", "target_fpr")
        return site.file.error(where, f"latents in a policy file are not calibrated. {advice}")
    return site.error((), f"no threshold is stated, here or beside the latents of {name!r}. {advice}")


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
    raise site.error_in_action(
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
    place = ("above", "target_fpr")
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
