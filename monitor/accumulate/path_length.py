"""How far a conversation has wandered: the sum of the steps from each request's statistic to the next one's."""

from __future__ import annotations

import math

from monitor.accumulate.base import Accumulator, State, Step


class PathLength(Accumulator):
    """``L_t = L_{t-1} + |statistic_t - statistic_{t-1}|``, from 0 at the first request. It never falls.

    Back and forth adds up where the ends lie close together.
    """

    kind = "path_length"

    def start(self) -> State:
        """See ``Accumulator.start``: the length, and the statistic before, NaN before the first request."""
        return (0.0, math.nan)

    def step(self, state: State, statistic: float, now: float) -> Step:
        """See ``Accumulator.step``."""
        length, before = state
        if not math.isnan(before):
            length += abs(statistic - before)
        return Step((length, statistic), length)
