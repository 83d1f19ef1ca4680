"""An exponentially weighted mean of the scores."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.signal import lfilter

from probes.aggregate.base import Aggregator, Scores


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
        keep = 1.0 - self.alpha
        previous = np.where(np.isnan(state[:, 0]), values[0], state[:, 0])
        if values.shape[0] == 1:
            running = (self.alpha * values[0] + keep * previous)[None]
        else:
            running, _ = lfilter([self.alpha], [1.0, -keep], values, axis=0, zi=(keep * previous)[None])
        state[:, 0] = running[-1]
        result: Scores = running
        return result
