"""Do live requests still look like those that a detector was calibrated on? Arithmetic on counts, bounded in memory.

Three questions, none of which ever acts on a request: are statistics distributed as on the card (``ScoreDrift``),
does a rule fire more often than was promised (``AlarmRateTest``), and how much of the traffic lies inside of what a
novelty detector knows (``Share``).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

WINDOW = 500
"""Requests that are compared with a card's quantiles: the newest."""
ENOUGH = 200
"""Requests without which nothing is said."""
_GROUPS = 10


class ScoreDrift:
    """The newest statistics of a detector against the quantiles of its calibration.

    Args:
        quantiles: of the benign statistics at evenly spaced levels, from the least to the largest; two at least.
        num_benign: how many statistics the quantiles are of.
        window: how many live statistics are compared.
    """

    def __init__(self, quantiles: Sequence[float], num_benign: int, *, window: int = WINDOW) -> None:
        steps = len(quantiles) - 1
        runs = [
            (edge, [place for place, _ in run]) for edge, run in groupby(enumerate(quantiles), lambda item: item[1])
        ]
        self._edges = [edge for edge, _ in runs]
        # Of n exchangeable values, a further one lies below all, or above all, with probability 1 / (n + 1) each.
        outside = 1.0 / (num_benign + 1)
        levels = np.zeros(2 * len(runs) + 1)
        for number, (_, places) in enumerate(runs):
            # Bins are what lies between two edges and what equals an edge, in turn: with ties, edges have a mass.
            below, at = places[0] / steps, places[-1] / steps
            levels[2 * number : 2 * number + 2] = outside + (1 - 2 * outside) * np.array([below, at])
        levels[-1] = 1.0
        self._levels = levels
        self._groups = _merged(np.diff(levels, prepend=0.0))
        self._expected = np.bincount(self._groups, weights=np.diff(levels, prepend=0.0))
        self._counts = np.zeros(len(levels), dtype=np.int64)
        self._newest: deque[int] = deque()
        self._window = window

    def add(self, statistic: float) -> None:
        """One more request.

        Args:
            statistic: finite.
        """
        place = bisect_left(self._edges, statistic)
        place = 2 * place + (place < bisect_right(self._edges, statistic))
        if len(self._newest) == self._window:
            self._counts[self._newest.popleft()] -= 1
        self._newest.append(place)
        self._counts[place] += 1

    @property
    def knows_enough(self) -> bool:
        """Whether there were requests enough to say something."""
        return len(self._newest) >= min(ENOUGH, self._window)

    def psi(self) -> float:
        """The population stability index: the sum of (p - q) ln(p / q) over ten groups of equal mass and both ends.

        Below 0.1 distributions count as equal, above 0.25 as different (Siddiqi, Credit Risk Scorecards, 2006). The
        ends are what lies outside of all that was seen in calibration. One request in all is spread over the groups,
        so that none is empty.
        """
        counts = np.bincount(self._groups, weights=self._counts)
        shares = (counts + self._expected) / (len(self._newest) + 1)
        return float(np.sum((shares - self._expected) * np.log(shares / self._expected)))

    def ks(self) -> float:
        """The distance of Kolmogorov and Smirnov, 0 to 1: the largest difference of two distribution functions."""
        live = np.cumsum(self._counts) / max(1, len(self._newest))
        return float(np.max(np.abs(live - self._levels)))


def _merged(masses: Float64) -> npt.NDArray[np.intp]:
    """The group of each bin: both ends by themselves, what lies between them in groups of about equal mass."""
    inner = masses[1:-1]
    limit = inner.sum() / _GROUPS - 1e-9
    groups, full, mass = np.zeros(len(masses), dtype=np.intp), 0, 0.0
    for place, part in enumerate(inner, start=1):
        if part > 0 and mass >= limit:
            full, mass = full + 1, 0.0
        groups[place] = 1 + full
        mass += float(part)
    if full and mass < limit:
        groups[groups == 1 + full] = full
    groups[-1] = groups.max() + 1
    return groups


class AlarmRateTest:
    """Does a rule fire on more requests than was promised? A test that may be looked at after every request.

    The bet: E multiplies by r / a when the rule fires and by (1 - r) / (1 - a) when it does not, for a target a and an
    alternative r. Whatever the requests are, as long as each fires with probability a at most given those before, E is
    a supermartingale, and so are mixtures over r and over the request at which a bet begins. By Ville's inequality it
    ever reaches 1 / error with probability ``error`` at most (Ramdas, Gruenwald, Vovk & Shafer, "Game-theoretic
    statistics and safe anytime-valid inference", 2023). Bets that begin later find a change that comes late. After a
    rejection the test begins anew with a smaller error, so that ``error`` bounds all rejections together.

    Args:
        target: share of requests that may fire, between 0 and 1.
        error: probability of ever rejecting while the promise holds.
        every: requests from the beginning of one bet to the next.
        kept: bets that are remembered; forgetting older ones costs power and nothing else.
    """

    _FACTORS = (1.5, 2.0, 4.0, 10.0)

    def __init__(self, target: float, *, error: float = 1e-3, every: int = 1000, kept: int = 24) -> None:
        rates = np.array([target * factor for factor in self._FACTORS if target * factor < 1] or [(1 + target) / 2])
        self._gain = np.log(rates / target)[:, None]
        self._loss = (np.log1p(-rates) - math.log1p(-target))[:, None]
        self._error = error
        self._every = every
        self._kept = kept
        self._round = 1
        self._begin()

    def _begin(self) -> None:
        self._begun = 0
        self._requests = 0
        self._fired = 0
        # Each column is a bet: its weight's logarithm, and the requests and firings that came before it.
        self._bets = np.zeros((3, 0))

    def add(self, *, fired: bool) -> bool:
        """One more request.

        Returns: whether this shows, once more, that the rate lies above the target.
        """
        if self._requests % self._every == 0:
            self._begun += 1
            weight = -math.log(self._begun * (self._begun + 1))
            kept = self._bets[:, -(self._kept - 1) :]
            self._bets = np.concatenate([kept, [[weight], [self._requests], [self._fired]]], axis=1)
        self._requests += 1
        self._fired += fired
        if not fired or self.log_evidence() < self._needed:
            return False
        self._round += 1
        self._begin()
        return True

    @property
    def _needed(self) -> float:
        """Logarithm of what the evidence has to reach in this round; the errors of all rounds add up to ``error``."""
        return math.log(math.pi**2 * self._round**2 / 6) - math.log(self._error)

    def log_evidence(self) -> float:
        """Natural logarithm of E, since the last rejection."""
        weights, requests_before, fired_before = self._bets
        if not weights.size:
            return 0.0
        requests, fired = self._requests - requests_before, self._fired - fired_before
        terms = weights + fired * self._gain + (requests - fired) * self._loss
        largest = float(terms.max())
        return largest + math.log(float(np.exp(terms - largest).sum()) / len(self._gain))


class Share:
    """The share of the newest requests of which something is true.

    Args:
        window: how many they are.
    """

    def __init__(self, *, window: int = WINDOW) -> None:
        self._newest: deque[bool] = deque(maxlen=window)
        self._true = 0

    def add(self, holds: bool) -> None:
        """One more request."""
        if len(self._newest) == self._newest.maxlen:
            self._true -= self._newest[0]
        self._newest.append(holds)
        self._true += holds

    @property
    def knows_enough(self) -> bool:
        """Whether there were requests enough to say something."""
        return len(self._newest) >= ENOUGH

    @property
    def value(self) -> float:
        """0 to 1; 0 before the first request."""
        return self._true / max(1, len(self._newest))
