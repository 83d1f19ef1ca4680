"""The mean of all scores so far."""

from __future__ import annotations

import numpy as np

from probes.aggregate.base import Aggregator, Scores


class Mean(Aggregator):
    """Arithmetic mean of the sequence so far.

    The sum runs in sequence order from the stored sum, so that chunks of any size give the same bits.
    """

    kind = "mean"

    @property
    def state_size(self) -> int:
        """Two values: how many scores, and their sum."""
        return 2

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        steps = values.shape[0]
        if steps == 1:
            state[:, 0] += 1
            state[:, 1] += values[0]
            return (state[:, 1] / state[:, 0])[None]
        sums = np.add.accumulate(np.concatenate([state[None, :, 1], values]), axis=0)[1:]
        counts = state[None, :, 0] + np.arange(1, steps + 1, dtype=np.float64)[:, None, None]
        state[:, 0] += steps
        state[:, 1] = sums[-1]
        running: Scores = sums / counts
        return running
