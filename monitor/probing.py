"""Probing: somebody whose requests lie near a threshold more often than benign ones would. Says so, and stops nobody.

Whoever looks for a prompt that just passes sends many that just pass and many that just do not. Of benign requests the
card knows how many lie that high. A cumulative sum of log-likelihood ratios (Page, 1954) compares the two for each
tenant: between two false alarms lie, in the mean, at least as many requests as were asked for (Lorden, 1971).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from monitor.check import Check
from monitor.strict import Strict
from probes.card import Calibration, Format, Stage
from probes.threshold import rate_bound

if TYPE_CHECKING:
    from monitor.policy import Plan

_WIDTH = 10
"""The band holds so many times as many benign requests as lie above the threshold."""
_LEAST_PROBING = 0.2
_FACTOR = 5
_MOST_BENIGN = 0.25


class ProbingSettings(Strict):
    """Tell when a tenant's requests lie near a threshold too often."""

    false_alarm_every: int = Field(
        default=1_000_000, ge=100, le=10**12, description="requests of a tenant between two false alarms, in the mean"
    )


@dataclass(frozen=True, slots=True)
class Band:
    """Where statistics are near a threshold.

    Attributes:
        check: position in the plan.
        low: a statistic in the band lies above it.
        high: and at most here.
        benign: at most such a share of benign requests lies in it.
        probing: the share among a prober's requests that is looked for; larger.
    """

    check: int
    low: float
    high: float
    benign: float
    probing: float

    def ratio(self, statistic: float) -> float:
        """Logarithm of how much likelier a statistic is from a prober."""
        if self.low < statistic <= self.high:
            return math.log(self.probing / self.benign)
        return math.log1p(-self.probing) - math.log1p(-self.benign)


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A tenant's requests lie near a threshold too often.

    Attributes:
        band: of the threshold.
        requests: since there was no sign of it.
        near: of these, those in the band.
    """

    band: Band
    requests: int
    near: int


@dataclass(slots=True)
class _Sum:
    value: float = 0.0
    requests: int = 0
    near: int = 0


class Probing:
    """Watches the requests of tenants under the policies of a plan that ask for it.

    Args:
        plan: its cards say what benign requests are like.
        most: tenants and thresholds that are remembered; those unheard of the longest go first.
    """

    def __init__(self, plan: Plan, *, most: int = 50_000) -> None:
        self._most = most
        self._limits = [
            math.log(policy.probing.false_alarm_every) if policy.probing is not None else math.inf
            for policy in plan.policies
        ]
        self._bands = {
            (number, fmt): tuple(_bands(plan, number, fmt)) if policy.probing is not None else ()
            for number, policy in enumerate(plan.policies)
            for fmt in Format
        }
        self._sums: OrderedDict[tuple[str, int, Format, int], _Sum] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sums)

    def bands(self, policy: int, fmt: Format) -> tuple[Band, ...]:
        """What is watched of a policy's requests."""
        return self._bands[policy, fmt]

    def see(self, tenant: str, policy: int, fmt: Format, statistics: Sequence[float]) -> list[Suspicion]:
        """Take in a request.

        Args:
            tenant: whose.
            policy: position of its policy in the plan.
            fmt: how its text reached the model.
            statistics: in the order of the plan's checks.
        Returns: what has become suspicious with it; it is watched anew from here on.
        """
        found = []
        for band in self._bands[policy, fmt]:
            statistic = statistics[band.check]
            if not math.isfinite(statistic):
                continue
            key = (tenant, policy, fmt, band.check)
            held = self._sums.pop(key, None) or _Sum()
            held.value += band.ratio(statistic)
            held.requests += 1
            held.near += band.low < statistic <= band.high
            if held.value >= self._limits[policy]:
                found.append(Suspicion(band, held.requests, held.near))
                continue
            if held.value > 0.0:  # else nothing is to be remembered
                self._sums[key] = held
        while len(self._sums) > self._most:
            self._sums.popitem(last=False)
        return found


def band_of(calibration: Calibration, threshold: float, check: int) -> Band | None:
    """The band around a threshold; None if the card knows too little of benign requests up there.

    Args:
        calibration: of the statistic.
        threshold: of a rule; it need not be the card's own.
        check: position in the plan.
    """
    top = calibration.top_scores
    above = sum(score > threshold for score in top)
    rank = min(len(top) - 1, _WIDTH * (above + 1))
    low = top[rank]
    benign = rate_bound(rank, calibration.num_benign)
    if not low < threshold or benign > _MOST_BENIGN:
        return None
    probing = max(_LEAST_PROBING, min(0.5, _FACTOR * benign), 2 * benign)
    return Band(check, low, threshold + (threshold - low), benign, probing)


def _bands(plan: Plan, policy: int, fmt: Format) -> Iterator[Band]:
    numbers = {number for rule in plan.policies[policy].rules for number in rule.verdicts}
    for number in sorted(numbers):
        check = plan.checks[number]
        if not isinstance(check, Check) or check.stage is not Stage.PROMPT or fmt not in check.thresholds:
            continue
        wanted = (check.stage, fmt, check.aggregate)
        for calibration in plan.cards[check.detector].calibrations:
            if (calibration.stage, calibration.format, calibration.aggregate) == wanted:
                band = band_of(calibration, check.thresholds[fmt], number)
                if band is not None:
                    yield band
