"""Aggregates of token scores, used on the statistics of requests: one sequence in the place of another."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from monitor.accumulate.base import Accumulator, State, Step
from probes.aggregate import Aggregator


class OfAggregate(Accumulator):
    """An accumulator that is an aggregate over requests; when they came does not matter."""

    @property
    @abstractmethod
    def aggregate(self) -> Aggregator:
        """The aggregate with these parameters."""

    def start(self) -> State:
        """See ``Accumulator.start``."""
        return tuple(self.aggregate.new_state(1, 1).ravel().tolist())

    def step(self, state: State, statistic: float, now: float) -> Step:
        """See ``Accumulator.step``."""
        held = np.array(state, dtype=np.float64).reshape(1, -1, 1)
        value = self.aggregate.update(held, np.full((1, 1, 1), statistic))
        return Step(tuple(held.ravel().tolist()), float(value.item()))
