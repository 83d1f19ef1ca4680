"""What may be done with a detector, by a stated rule on figures; knows no model and no text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from probes.fit.evaluation.controls import TEXT_PEERS, Control
from probes.fit.evaluation.measure import Estimate

__all__ = ["SOURCE", "Evidence", "Grade", "Trivial", "Verdict", "decide", "least"]

CHANCE = 0.5
IN_DISTRIBUTION = 0.95
"""AUROC from which on a detector counts as good on rows of the sources that it was trained on."""
NEAR_CHANCE = 0.6
"""AUROC up to which it counts as failing on other sources."""
EXPLAINS = 0.9
"""AUROC from which on a trivial feature counts as giving the training labels away."""
MARGIN = 0.02
"""A trivial control does as well if it lacks no more AUROC than this."""
SOURCE = "source"
"""The shortcut's name where no trivial feature explains it: what tells the sources apart."""


class Grade(StrEnum):
    """What is to be done with a detector."""

    SHIP = "ship"
    """Surely better than every text-only scorer on rows of other sources."""
    ASSIST = "assist"
    """Surely above chance, but not surely above what the text alone gives."""
    REJECT = "reject"
    """Not surely above chance."""
    SHORTCUT = "shortcut"
    """It has learned something that goes along with the concept in these rows, and is not the concept."""


@dataclass(frozen=True, slots=True)
class Trivial:
    """A trivial control on the rows that the detector is measured on.

    Attributes:
        auroc: of the control.
        difference: AUROC of the detector minus it, paired.
    """

    auroc: Estimate
    difference: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a verdict rests on.

    Attributes:
        detector: its AUROC on the rows that decide.
        rests_on: which rows these are, in words.
        texts: AUROC of every text-only scorer on the same rows.
        trivial: length and question mark on the rows that the detector is measured on.
        in_distribution: AUROC of the same fit on rows of its own sources that it was not fitted on; None: not known.
        out_of_source: AUROC on rows of other sources, the lowest that was measured; None: not known.
        trivial_in_training: AUROC of length and question mark on the training rows.
    """

    detector: Estimate
    rests_on: str
    texts: Mapping[Control, float]
    trivial: Mapping[Control, Trivial]
    in_distribution: float | None = None
    out_of_source: float | None = None
    trivial_in_training: Mapping[Control, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The grade and why.

    Attributes:
        grade: of the detector.
        shortcut: what it has learned in the place of the concept; None where nothing speaks for that.
        rests_on: the rows that decide, in words.
        reasons: in words, the deciding ones first.
    """

    grade: Grade
    shortcut: str | None
    rests_on: str
    reasons: tuple[str, ...]


def decide(evidence: Evidence) -> Verdict:
    """The grade of a detector.

    Shortcuts are looked for first: a detector that is good at home and near chance elsewhere, or no better than a
    trivial feature, is not made better by being above chance.
    """
    found = _by_source(evidence) or _not_above_chance(evidence) or _by_trivial(evidence) or _beside_texts(evidence)
    return Verdict(found.grade, found.shortcut, evidence.rests_on, found.reasons)


@dataclass(frozen=True, slots=True)
class _Finding:
    grade: Grade
    reasons: tuple[str, ...]
    shortcut: str | None = None


def _by_source(evidence: Evidence) -> _Finding | None:
    home, away = evidence.in_distribution, evidence.out_of_source
    if home is None or away is None or home < IN_DISTRIBUTION or away > NEAR_CHANCE:
        return None
    reasons = [
        f"On rows of the sources that it was trained on its AUROC is {home:.3f}, on rows of other sources {away:.3f}: "
        "what it has learned is not the concept."
    ]
    explaining = {name: value for name, value in evidence.trivial_in_training.items() if value >= EXPLAINS}
    if not explaining:
        reasons.append("Neither length nor question mark explains it: it tells the sources apart by something else.")
        return _Finding(Grade.SHORTCUT, tuple(reasons), SOURCE)
    name = max(explaining, key=lambda control: explaining[control])
    reasons.append(f"In the training rows {name.value} alone has an AUROC of {explaining[name]:.3f}.")
    return _Finding(Grade.SHORTCUT, tuple(reasons), name.value)


def _not_above_chance(evidence: Evidence) -> _Finding | None:
    if evidence.detector.low > CHANCE:
        return None
    return _Finding(
        Grade.REJECT, (f"Its AUROC is {_interval(evidence.detector)}: the interval is not above {CHANCE}.",)
    )


def _by_trivial(evidence: Evidence) -> _Finding | None:
    for name, control in evidence.trivial.items():
        if control.auroc.low > CHANCE and control.difference.value <= MARGIN:
            return _Finding(
                Grade.SHORTCUT,
                (
                    f"{name.value} alone has an AUROC of {_interval(control.auroc)} on the measured rows, the detector "
                    f"{control.difference.value:+.3f} beside it: these rows cannot tell it from that feature. "
                    "Match the negatives to the positives in length and form, and measure again.",
                ),
                name.value,
            )
    return None


def _beside_texts(evidence: Evidence) -> _Finding:
    found = _interval(evidence.detector)
    if not any(peer in evidence.texts for peer in TEXT_PEERS):
        return _Finding(
            Grade.ASSIST,
            (
                f"Its AUROC is {found}, surely above chance; no trained text-only scorer was measured beside it, so "
                "more cannot be said. Give the rows that it was trained on (--train).",
            ),
        )
    best = max(evidence.texts, key=lambda control: evidence.texts[control])
    value = evidence.texts[best]
    if evidence.detector.low > value:
        return _Finding(
            Grade.SHIP, (f"Its AUROC is {found}, surely above the best text-only scorer's {value:.3f} ({best.value}).",)
        )
    return _Finding(
        Grade.ASSIST,
        (
            f"Its AUROC is {found}, surely above chance but not surely above the best text-only scorer's {value:.3f} "
            f"({best.value}).",
        ),
    )


def least(verdicts: Mapping[str, Verdict]) -> Verdict:
    """The least favourable of several; the first among equals.

    Args:
        verdicts: by what each is of; at least one.
    """
    order = (Grade.SHORTCUT, Grade.REJECT, Grade.ASSIST, Grade.SHIP)
    return min(verdicts.values(), key=lambda verdict: order.index(verdict.grade))


def _interval(found: Estimate) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
