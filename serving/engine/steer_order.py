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


@dataclass(frozen=True, slots=True)
class GateOrder:
    """Watch a request's rows, and write to those that the gate opens for.

    Attributes:
        gate: its position in the plan.
        limit: above which a readout opens it.
        reads: the first position that is watched, and the one behind the last.
        writes: the first position that may be written to, and the one behind the last.
    """

    gate: int
    limit: float
    reads: tuple[int, int]
    writes: tuple[int, int]


StepOrders = Mapping[str, Sequence[SteerOrder | GateOrder]]
"""By request; those that are not steered are missing."""
