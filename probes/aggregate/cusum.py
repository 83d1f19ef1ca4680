"""A cumulative sum that forgets as long as nothing happens: for a small shift that stays (Page, 1954)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from probes.aggregate.base import Aggregator, Scores

_BLOCK = 64


class Cusum(Aggregator):
    """``S_t = max(0, S_{t-1} + score_t - drift)``, from ``S_0 = 0``.

    Many scores a little above ``drift`` add up, where no single one would stand out; those below it take away again.
    """

    kind = "cusum"

    drift: Annotated[
        float, Field(allow_inf_nan=False, description="subtracted from each score: above what benign text scores")
    ] = 0.0

    @property
    def state_size(self) -> int:
        """The sum."""
        return 1

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        running = np.empty_like(values)
        for start in range(0, len(values), _BLOCK):
            block = values[start : start + _BLOCK]
            # What the plain sum is above its lowest point so far. In blocks: it would lose digits on its way down.
            plain = state[:, 0] + np.cumsum(block - self.drift, axis=0)
            lowest = np.minimum(np.minimum.accumulate(plain, axis=0), 0.0)
            running[start : start + len(block)] = plain - lowest
            state[:, 0] = running[start + len(block) - 1]
        return running
