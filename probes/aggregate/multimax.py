"""The sum of each head's largest value: attention with a hard maximum in the place of the softmax."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from probes.aggregate.base import Aggregator, Scores


class MultiMax(Aggregator):
    """``sum over heads h of max over t of v[t, h]``: the statistic of a MultiMax probe (arXiv 2601.11516).

    A row gives its ``heads`` values. Does not dilute in long texts; grows with length like a maximum.
    """

    kind = "multimax"

    heads: Annotated[int, Field(ge=1, le=64, description="of the detector")]

    @property
    def channels(self) -> int:
        """A value for each head."""
        return self.heads

    @property
    def state_size(self) -> int:
        """Each head's largest value."""
        return self.heads

    @property
    def initial(self) -> float:
        """Nothing seen yet."""
        return -np.inf

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        steps, requests = values.shape[:2]
        best = state.swapaxes(1, 2)
        found = np.maximum.accumulate(values.reshape(steps, requests, -1, self.heads), axis=0)
        np.maximum(found, best, out=found)
        best[:] = found[-1]
        running: Scores = found.sum(axis=-1)
        return running
