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
        """How many scores there were, and the newest ``window`` of them: the n-th (from 0) at place n mod window."""
        return self.window + 1

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        steps, window = values.shape[0], self.window
        if steps == 1:
            return self._update_one(state, values[0])[None]
        seen = state[:, 0, :1].astype(np.intp)
        places = (seen + np.arange(window)) % window
        past = np.take_along_axis(state[:, 1:], places[:, 1:, None], axis=1)
        joined = np.concatenate([np.moveaxis(past, 1, 0), values])
        sums = np.zeros_like(values)
        for offset in range(window):
            sums += joined[offset : offset + steps]
        counts = state[None, :, 0] + np.arange(1, steps + 1, dtype=np.float64)[:, None, None]
        running: Scores = np.where(counts >= window, sums / window, -np.inf)
        state[:, 0] += steps
        newest = np.moveaxis(joined[-window:], 0, 1)
        np.put_along_axis(state[:, 1:], (places + steps)[:, :, None] % window, newest, axis=1)
        return running

    def _update_one(self, state: Scores, values: Scores) -> Scores:
        """One score of each request: what a generated token brings."""
        counts = state[:, 0]
        state[np.arange(len(state)), counts[:, 0].astype(np.intp) % self.window + 1] = values
        counts += 1
        running: Scores = np.einsum("rwb->rb", state[:, 1:])
        running /= self.window
        short = counts[:, 0] < self.window
        if short.any():
            running[short] = -np.inf
        return running
