"""The m-th largest of the newest n scores: above a threshold exactly when at least m of the newest n are."""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from probes.aggregate.base import Aggregator, Scores

_ROWS_AT_ONCE = 64


class MOfN(Aggregator):
    """Evidence that must repeat: one high score among ``window`` does not suffice, ``count`` of them do.

    Undefined (-inf) until ``count`` scores are there.
    """

    kind = "m_of_n"

    count: Annotated[int, Field(ge=1, le=256, description="m: scores that must be high")] = 3
    window: Annotated[int, Field(ge=1, le=256, description="n: newest scores that are looked at")] = 8

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.count > self.window:
            raise ValueError(f"count is {self.count}, window {self.window}: count must not be larger")
        return self

    @property
    def state_size(self) -> int:
        """The newest ``window - 1`` scores, oldest first (one unused value where ``window`` is 1)."""
        return max(1, self.window - 1)

    @property
    def initial(self) -> float:
        """Scores that are not there yet are below every threshold."""
        return -np.inf

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        kept = self.window - 1
        joined = np.concatenate([np.moveaxis(state[:, :kept], 1, 0), values])
        running = np.empty_like(values)
        place = self.window - self.count
        # In slices: the windows of a long prompt, laid side by side, would fill the memory.
        for start in range(0, len(values), _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, len(values))
            windows = np.lib.stride_tricks.sliding_window_view(joined[start : stop + kept], self.window, axis=0)
            running[start:stop] = np.partition(windows, place, axis=-1)[..., place]
        if kept:
            state[:] = np.moveaxis(joined[-kept:], 0, 1)
        return running
