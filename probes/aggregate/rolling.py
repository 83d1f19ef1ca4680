"""The mean of the newest few scores."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from probes.aggregate.base import Aggregator, Scores


class Rolling(Aggregator):
    """Mean over a window of the newest ``window`` scores; undefined (-inf) until the window is full.

    Each window is summed anew from its oldest score on, so nothing drifts over a long stream.
    """

    kind = "rolling"

    window: Annotated[int, Field(ge=1, le=1024, description="tokens in the window")] = 16

    @property
    def state_size(self) -> int:
        """The newest ``window - 1`` scores (oldest first), and how many there are."""
        return self.window

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        steps, window = values.shape[0], self.window
        joined = np.concatenate([np.moveaxis(state[:, 1:], 1, 0), values])
        sums = np.zeros_like(values)
        for offset in range(window):
            sums += joined[offset : offset + steps]
        counts = state[None, :, 0] + np.arange(1, steps + 1, dtype=np.float64)[:, None, None]
        running: Scores = np.where(counts >= window, sums / window, -np.inf)
        state[:, 0] += steps
        if window > 1:
            state[:, 1:] = np.moveaxis(joined[-(window - 1) :], 0, 1)
        return running
