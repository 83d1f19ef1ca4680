"""One request's gate as the scheduler knows it: what accepted rows have opened, which is what counts in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from monitor.gates import SteerGate
from monitor.rule import Gate
from probes.card import Format
from serving.engine.steer_order import GateOrder, SteerOrder


@dataclass(slots=True)
class OpenGate:
    """A gate that rows of a live request may open, or have opened.

    Attributes:
        number: its position in the plan.
        gate: it.
        limit: above which a readout opens it.
        reads: the first position that is watched, and the one behind the last.
        writes: the first position that may be written to, and the one behind the last.
        latch: the first position that has opened it.
        seen: all positions before have been looked at.
    """

    number: int
    gate: SteerGate
    limit: np.float32
    reads: tuple[int, int]
    writes: tuple[int, int]
    latch: int | None = None
    seen: int = 0

    @classmethod
    def of(
        cls, number: int, gate: SteerGate, fmt: Format, span: tuple[int, int], *, num_prompt: int, stream_from: int
    ) -> Self | None:
        """The gate of a request that has just come; None if nothing can open it in its format.

        Args:
            number: the gate's position in the plan.
            gate: it.
            fmt: how the request's text reached the model.
            span: of its steer.
            num_prompt: its prompt tokens.
            stream_from: position from which its stream is read.
        """
        limit = gate.limit(fmt)
        return cls(number, gate, limit, gate.reads(num_prompt, stream_from), span) if limit is not None else None

    @property
    def first_written(self) -> int | None:
        """The first position that may have been written to, so far."""
        if self.latch is None:
            return None
        return max(self.writes[0], self.latch + (self.gate.kind is Gate.LATCHED))

    def order(self, first: int) -> SteerOrder | GateOrder | None:
        """What a worker is told of it; None if it stays shut.

        Args:
            first: position of the step's first row.
        """
        if self.gate.kind is Gate.LATCHED and (start := self.first_written) is not None:
            return SteerOrder(self.gate.steer, start, self.writes[1])
        # A step before may be under way, and a preempted request is read again.
        if min(first, self.seen) >= self.reads[1]:
            return None
        return GateOrder(self.number, float(self.limit), self.reads, self.writes)

    def see(self, positions: npt.NDArray[np.int64], readouts: npt.NDArray[np.float32]) -> None:
        """Look at rows that belong to the request for certain.

        Args:
            positions: (n,) ascending, n at least 1.
            readouts: (n, width of the bank).
        """
        opens = positions[self._opens(positions, readouts)]
        if len(opens):
            self.latch = int(opens[0]) if self.latch is None else min(self.latch, int(opens[0]))
        self.seen = max(self.seen, int(positions[-1]) + 1)

    def due(self, positions: npt.NDArray[np.int64], readouts: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Which of a step's rows have to be written to: (n,) of each."""
        inside = (positions >= self.writes[0]) & (positions < self.writes[1])
        if self.gate.kind is Gate.TOKEN:
            return inside & self._opens(positions, readouts)
        return inside & (positions > self.latch) if self.latch is not None else np.zeros(len(positions), dtype=bool)

    def _opens(self, positions: npt.NDArray[np.int64], readouts: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        start, stop = self.reads
        above = readouts[:, self.gate.column] > self.limit
        return np.asarray(above & (positions >= start) & (positions < stop))
