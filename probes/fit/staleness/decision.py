"""PASS, STALE, DEGRADED or INCONCLUSIVE, by a stated rule on the figures of a comparison. Pure: no model, no file.

The rule stands in words in ``docs/gate.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.special import bdtrc

from probes.card import Calibration
from probes.fit.staleness.comparison import Agreement, Benign, Comparison, Positive
from probes.threshold import allowed_exceedances, benign_needed

__all__ = ["EXIT_CODES", "Claim", "Decision", "Margins", "Verdict", "decide"]

_FEWEST_TO_CONDEMN = 20
"""Groups of each label below which a bootstrap says nothing, however bad it looks."""
_MOST_ASKED_FOR = 1_000_000


class Verdict(StrEnum):
    """What a comparison of two builds comes to."""

    PASS = "PASS"  # noqa: S105 - no password
    """It ranks as well, and its threshold keeps its promise."""
    STALE = "STALE"
    """The threshold surely no longer keeps its promise: calibrate again."""
    DEGRADED = "DEGRADED"
    """It surely ranks worse: repair it, or train again."""
    INCONCLUSIVE = "INCONCLUSIVE"
    """These rows do not tell."""


EXIT_CODES: Mapping[Verdict, int] = MappingProxyType(
    {Verdict.PASS: 0, Verdict.STALE: 10, Verdict.DEGRADED: 11, Verdict.INCONCLUSIVE: 12}
)
"""Of ``telltale gate check``: stable. 1 is a crash and 2 a wrong use, as everywhere."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Claim(_Strict):
    """What the threshold says of benign requests."""

    thresholds: tuple[float, ...] = Field(min_length=1, description="fires above it, strictly; shortest requests first")
    max_tokens: tuple[int, ...] = Field(default=(), description="longest read sequence of each threshold but the last")
    target_fpr: float = Field(gt=0, lt=1)
    confidence: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _one_threshold_for_each_length(self) -> Self:
        if len(self.thresholds) != len(self.max_tokens) + 1:
            raise ValueError("there must be one threshold more than there are lengths in max_tokens")
        return self

    @classmethod
    def of(cls, calibration: Calibration) -> Claim:
        """What a calibration says, by length where it has buckets."""
        buckets = calibration.buckets
        return cls(
            thresholds=tuple(bucket.threshold for bucket in buckets) or (calibration.threshold,),
            max_tokens=tuple(bucket.max_tokens for bucket in buckets if bucket.max_tokens is not None),
            target_fpr=calibration.target_fpr,
            confidence=calibration.confidence,
        )

    def fires(self, statistics: npt.NDArray[np.float64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """(n,) whether requests with these statistics and lengths in tokens fire."""
        limits = np.array(self.thresholds)[np.searchsorted(np.array(self.max_tokens, dtype=np.int64), lengths)]
        return np.asarray(statistics > limits)


class Margins(_Strict):
    """How much may be lost."""

    auroc: float = Field(default=0.02, gt=0, lt=0.5)
    tpr: float = Field(default=0.05, gt=0, lt=1, description="of the true-positive rate at the threshold")
    agreement: float = Field(default=0.95, gt=0, lt=1, description="rank correlation that stands in for labels")


class Decision(_Strict):
    """A verdict with its reasons.

    Attributes:
        verdict: what it comes to.
        reasons: a sentence for each part of the rule.
        needs: what would have to be given for a part that is open.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """Of the command."""
        return EXIT_CODES[self.verdict]


class _State(StrEnum):
    KEPT = "kept"
    LOST = "lost"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class _Part:
    state: _State
    reason: str
    needs: str = ""


def decide(found: Comparison, claim: Claim, margins: Margins) -> Decision:
    """Apply the rule.

    Args:
        found: the figures; the confidence of their bounds is the claim's.
        claim: of the recorded threshold.
        margins: how much may be lost.
    """
    ranking = _ranking(found, claim, margins)
    threshold = [_alarms(found.benign, claim)]
    if found.positive is not None:
        threshold.append(_caught(found.positive, claim, margins))
    parts = [ranking, *threshold]
    if ranking.state is _State.LOST:
        verdict = Verdict.DEGRADED
    elif any(part.state is _State.LOST for part in threshold):
        verdict = Verdict.STALE
    elif any(part.state is _State.OPEN for part in parts):
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.PASS
    return Decision(
        verdict=verdict,
        reasons=tuple(part.reason for part in parts),
        needs=tuple(part.needs for part in parts if part.needs),
    )


def _ranking(found: Comparison, claim: Claim, margins: Margins) -> _Part:
    if found.ranking is None or found.benign is None or found.positive is None:
        return _agreeing(found.agreement, claim, margins)
    loss, groups = found.ranking.loss, min(found.benign.groups, found.positive.groups)
    least = benign_needed(margins.auroc, confidence=claim.confidence)
    said = (
        f"AUROC {found.ranking.auroc_before:.4f} before, {found.ranking.auroc_after:.4f} now; "
        f"loss {loss.value:+.4f} ({loss.low:+.4f} to {loss.high:+.4f})"
    )
    if loss.high < margins.auroc and groups >= least:
        return _Part(_State.KEPT, f"{said}: surely less than {margins.auroc:g}.")
    if loss.low > 0 and loss.high >= margins.auroc and groups >= _FEWEST_TO_CONDEMN:
        return _Part(_State.LOST, f"{said}: it surely ranks worse.")
    if groups < least:
        needs = f"at least {least} independent positive and {least} independent benign rows"
    elif loss.value < margins.auroc:
        needs = f"about {_scaled(groups, loss.high - loss.value, margins.auroc - loss.value)} rows of each label"
    else:
        needs = "more rows of each label: the loss is about the margin or above it"
    return _Part(_State.OPEN, f"{said}: not surely less than {margins.auroc:g}.", f"For AUROC: {needs}.")


def _agreeing(found: Agreement, claim: Claim, margins: Margins) -> _Part:
    """Without both labels nobody sees how well it ranks; it ranks as before if it orders the requests as before."""
    least = benign_needed(margins.auroc, confidence=claim.confidence)
    correlation, low = found.rank_correlation, found.rank_correlation_low
    if correlation is None or low is None:
        said = "No rows with both labels, and no rank correlation between the builds"
    else:
        said = f"No rows with both labels; rank correlation between the builds {correlation:.4f} (at least {low:.4f})"
        if low >= margins.agreement and found.groups >= least:
            return _Part(_State.KEPT, f"{said}: they order requests alike.")
    return _Part(
        _State.OPEN,
        f"{said}: whether it ranks as well is not known.",
        f"For AUROC: labelled rows, at least {least} of each label.",
    )


def _alarms(found: Benign | None, claim: Claim) -> _Part:
    target, confidence = claim.target_fpr, claim.confidence
    least = benign_needed(target, confidence=confidence)
    if found is None:
        return _Part(
            _State.OPEN, "No benign rows: false alarms were not seen.", f"For false alarms: {least} benign rows."
        )
    allowed = allowed_exceedances(found.groups, target, confidence=confidence)
    said = (
        f"False alarms on {found.num} benign rows: {found.alarms_before} before, {found.alarms_after} now; "
        f"{found.newly} fire newly, {found.no_longer} no longer"
    )
    risk = 1.0 - confidence
    above = bdtrc(found.alarms_after - 1, found.num, target) <= risk if found.alarms_after else False
    changed = found.newly + found.no_longer
    grown = bdtrc(found.newly - 1, changed, 0.5) <= risk if found.newly else False
    if above and grown:
        return _Part(_State.LOST, f"{said}: the rate is surely above {target:g}, and surely above what it was.")
    most = max(found.alarms_before, math.floor(target * found.num))
    if allowed is not None and found.newly <= allowed and found.alarms_after <= most:
        return _Part(_State.KEPT, f"{said}: surely less than {target:g} of the requests fire newly.")
    if allowed is None:
        needs = f"at least {least} independent benign rows"
    elif found.newly > allowed and (count := _benign_for(found.newly / found.groups, claim)) is not None:
        needs = f"about {count} benign rows"
    else:
        needs = f"more benign rows: the rate is near {target:g} or above it"
    return _Part(
        _State.OPEN, f"{said}: it is not sure that the promise of {target:g} holds.", f"For false alarms: {needs}."
    )


def _caught(found: Positive, claim: Claim, margins: Margins) -> _Part:
    loss, least = found.loss, benign_needed(margins.tpr, confidence=claim.confidence)
    said = (
        f"Of {found.num} positive rows {found.caught_before} fired before, {found.caught_after} now; "
        f"loss {loss.value:+.3f} ({loss.low:+.3f} to {loss.high:+.3f})"
    )
    if loss.low > margins.tpr and found.groups >= _FEWEST_TO_CONDEMN:
        return _Part(_State.LOST, f"{said}: the threshold surely catches {margins.tpr:g} less.")
    if loss.high <= margins.tpr and found.groups >= least:
        return _Part(_State.KEPT, f"{said}: surely no more than {margins.tpr:g}.")
    if found.groups < least:
        needs = f"at least {least} independent positive rows"
    elif loss.value < margins.tpr:
        needs = f"about {_scaled(found.groups, loss.high - loss.value, margins.tpr - loss.value)} positive rows"
    else:
        needs = "more positive rows: the loss is about the margin or above it"
    return _Part(_State.OPEN, f"{said}: not surely within {margins.tpr:g}.", f"For the share caught: {needs}.")


def _scaled(count: int, width: float, wanted: float) -> int:
    """Rows with which a bound that lies ``width`` away would lie ``wanted`` away: widths shrink with the root."""
    return min(_MOST_ASKED_FOR, math.ceil(count * max(1.0, (width / wanted) ** 2)))


def _benign_for(rate: float, claim: Claim) -> int | None:
    """Benign rows of which surely less than the target fire newly, if they go on at this rate; None: no number does."""
    count = benign_needed(claim.target_fpr, confidence=claim.confidence)
    while count <= _MOST_ASKED_FOR:
        allowed = allowed_exceedances(count, claim.target_fpr, confidence=claim.confidence)
        if allowed is not None and rate * count <= allowed:
            return count
        count = math.ceil(count * 1.1)
    return None
