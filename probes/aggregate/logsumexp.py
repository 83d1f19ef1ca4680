"""A smooth maximum: the logarithm of the mean of the scores' exponentials."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from probes.aggregate.base import Aggregator, Scores


class LogSumExp(Aggregator):
    """``temperature * log(mean(exp(score / temperature)))``: the maximum as it goes to 0, the mean as it grows.

    The mean, not the sum: a text that says the same thing for longer has the same value.
    """

    kind = "logsumexp"

    temperature: Annotated[
        float, Field(gt=0.0, le=1e3, allow_inf_nan=False, description="in units of the scores; lower is nearer the max")
    ] = 1.0

    @property
    def state_size(self) -> int:
        """The logarithm of the sum so far, and of the number of scores."""
        return 2

    @property
    def initial(self) -> float:
        """The logarithm of nothing."""
        return -np.inf

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        # One after the other, as in a stream: any way of cutting the sequence adds the same numbers in the same order.
        sums = np.logaddexp.accumulate(np.concatenate([state[None, :, 0], values / self.temperature]), axis=0)[1:]
        counts = np.exp(state[:, 1]) + np.arange(1, len(values) + 1, dtype=np.float64)[:, None, None]
        logs = np.log(np.rint(counts))
        state[:, 0], state[:, 1] = sums[-1], logs[-1]
        running: Scores = self.temperature * (sums - logs)
        return running
