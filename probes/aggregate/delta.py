"""How far the scores have moved from where a segment began."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from probes.aggregate.base import Aggregator, Scores


class Delta(Aggregator):
    """The scores minus the one of the row before the first that a rule reads: its newest, mean or largest.

    So of a rule with ``segments: [tool]``, what the tool's answer has changed (task drift; Abdelnabi et al., arXiv
    2406.00799, who take the newest). Where nothing stands before the first row, that row is what the others are
    compared with.
    """

    kind = "delta"
    reads_before = True

    of: Annotated[
        Literal["last", "mean", "max"], Field(description="which of the differences: the newest, their mean or largest")
    ] = "last"

    @property
    def state_size(self) -> int:
        """The score that the others are compared with, and how many they are, their sum and the largest of them."""
        return 4

    @property
    def initial(self) -> float:
        """NaN marks a sequence that has not begun."""
        return float("nan")

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        first = np.isnan(state[:, 0])
        state[:, 0] = np.where(first, values[0], state[:, 0])
        count = np.where(first, 0.0, state[:, 1]) + np.arange(1, len(values) + 1, dtype=np.float64)[:, None, None]
        count -= first
        differences = values - state[:, 0]
        # The row that is compared with is no difference: it adds nothing to the sum, and is not the largest.
        total = np.where(first, 0.0, state[:, 2]) + np.cumsum(differences, axis=0)
        differences[0] = np.where(first, -np.inf, differences[0])
        largest = np.maximum(np.maximum.accumulate(differences, axis=0), np.where(first, -np.inf, state[:, 3]))
        state[:, 1], state[:, 2], state[:, 3] = count[-1], total[-1], largest[-1]
        if self.of == "last":
            return differences
        running: Scores = largest if self.of == "max" else np.where(count > 0, total / np.maximum(count, 1), -np.inf)
        return running
