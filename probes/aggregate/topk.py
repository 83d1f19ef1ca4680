"""The mean of the few largest scores so far."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from probes.aggregate.base import Aggregator, Scores


class TopK(Aggregator):
    """Mean of the ``k`` largest scores, or of all while there are fewer.

    Between the maximum, which one token raises, and the mean, which dilutes: grows with length, more slowly than the
    maximum.
    """

    kind = "topk"

    k: Annotated[int, Field(ge=1, le=256, description="how many of the largest scores count")] = 8

    @property
    def state_size(self) -> int:
        """The largest ``k`` scores, in any order."""
        return self.k

    @property
    def initial(self) -> float:
        """Scores that are not there yet are below all others."""
        return -np.inf

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        running = np.empty_like(values)
        newest = self._mean(state)
        for step, scores in enumerate(values):
            lowest = state.argmin(axis=1)[:, None]
            kept = np.take_along_axis(state, lowest, axis=1)
            if bool((scores[:, None] > kept).any()):
                np.put_along_axis(state, lowest, np.maximum(kept, scores[:, None]), axis=1)
                newest = self._mean(state)
            running[step] = newest
        return running

    def _mean(self, state: Scores) -> Scores:
        """Summed anew each time, so that nothing drifts over a long stream: (R, B), -inf where there is no score."""
        there = state > -np.inf
        count = there.sum(axis=1)
        total: Scores = np.where(there, state, 0.0).sum(axis=1)
        return np.where(count > 0, total / np.maximum(count, 1), -np.inf)
