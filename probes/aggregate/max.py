"""The largest score so far."""

from __future__ import annotations

import numpy as np

from probes.aggregate.base import Aggregator, Scores


class Max(Aggregator):
    """Maximum of the sequence so far. Grows with length: calibrate on requests as long as the real ones."""

    kind = "max"
    one_score_decides = True

    @property
    def state_size(self) -> int:
        """One value: the maximum."""
        return 1

    @property
    def initial(self) -> float:
        """Nothing seen yet."""
        return -np.inf

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        if len(values) == 1:
            newest: Scores = np.maximum(state[:, 0], values[0])
            state[:, 0] = newest
            return newest[None]
        running: Scores = np.maximum.accumulate(values, axis=0)
        np.maximum(running, state[None, :, 0], out=running)
        state[:, 0] = running[-1]
        return running
