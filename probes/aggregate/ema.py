"""An exponentially weighted mean of the scores."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

import numpy as np
from pydantic import Field

from probes.aggregate.base import Aggregator, Scores

_BLOCK = 32


@lru_cache(maxsize=64)
def _solved(alpha: float, steps: int) -> tuple[Scores, Scores]:
    """The recurrence over a few steps: what each mean owes to each score, and to the mean before them."""
    keep = 1.0 - alpha
    age = np.subtract.outer(np.arange(steps), np.arange(steps))
    from_values: Scores = np.where(age >= 0, alpha * keep ** np.maximum(age, 0), 0.0)
    from_previous: Scores = keep ** np.arange(1, steps + 1, dtype=np.float64)
    return from_values, from_previous


class Ema(Aggregator):
    """e_t = alpha * x_t + (1 - alpha) * e_{t-1}, starting at e_1 = x_1."""

    kind = "ema"

    alpha: Annotated[float, Field(gt=0.0, le=1.0, description="weight of the newest score")] = 0.12

    @property
    def state_size(self) -> int:
        """One value: the mean so far, NaN before the first score."""
        return 1

    @property
    def initial(self) -> float:
        """NaN marks a sequence that has not begun."""
        return float("nan")

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        if len(values) == 1:
            return self._update_one(state[:, 0], values[0])[None]
        previous = np.where(np.isnan(state[:, 0]), values[0], state[:, 0])
        running = np.empty_like(values)
        for start in range(0, len(values), _BLOCK):
            block = values[start : start + _BLOCK]
            from_values, from_previous = _solved(self.alpha, len(block))
            flat = from_values @ block.reshape(len(block), -1)
            running[start : start + len(block)] = flat.reshape(block.shape) + from_previous[:, None, None] * previous
            previous = running[start + len(block) - 1]
        state[:, 0] = previous
        return running

    def _update_one(self, mean: Scores, values: Scores) -> Scores:
        """One score of each request, into the means (a view): what a generated token brings."""
        fresh = np.isnan(mean)
        if fresh.any():
            mean[fresh] = values[fresh]
        mean *= 1.0 - self.alpha
        mean += self.alpha * values
        return mean.copy()
