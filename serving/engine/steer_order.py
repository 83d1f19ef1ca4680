"""What the scheduler tells the workers of one step: which of its requests are steered, from where to where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STEERS = "telltale_steers"
"""Name of the extra attribute on vLLM's ``SchedulerOutput``."""


@dataclass(frozen=True, slots=True)
class SteerOrder:
    """Write to a request's rows.

    Attributes:
        steer: its position in the plan.
        start: the first position.
        stop: the one behind the last.
        scale: by how much of its strength.
    """

    steer: int
    start: int
    stop: int
    scale: float = 1.0


StepOrders = Mapping[str, Sequence[SteerOrder]]
"""By request; those that are not steered are missing."""
