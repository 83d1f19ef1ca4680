"""One request that is steered, or may be: what is written to it, and which of its blocks are its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from probes.steering.steer import END
from serving.engine.open_gates import OpenGate
from serving.engine.private_blocks import PrivateBlocks
from serving.engine.steer_order import GateOrder, SteerOrder


@dataclass(slots=True)
class SteeredRequest:
    """A live request that is steered, or may be.

    Attributes:
        orders: what is written to it.
        pending: steers that a rule has switched on since the request was last scheduled, each with the first position
            that was not judged then.
        blocks: its KV; None if it is shared.
        gates: that its rows may open, or have opened.
        in_prompt: whether a gate can open for rows of the prompt.
        told: the first position whose dose was not told yet; rows that are computed again do not count twice.
    """

    orders: list[SteerOrder]
    blocks: PrivateBlocks | None
    gates: list[OpenGate] = field(default_factory=list)
    in_prompt: bool = False
    pending: dict[int, int] = field(default_factory=dict)
    told: int = 0

    @property
    def is_written(self) -> bool:
        """Whether any row can have been written to so far."""
        return bool(self.orders) or any(gate.latch is not None for gate in self.gates)

    def known(self) -> set[int]:
        """Steers that need not be switched on any more."""
        return {*self.pending, *(order.steer for order in self.orders)}

    def ordered(self, first: int) -> list[SteerOrder | GateOrder]:
        """What the workers are told of a step.

        Args:
            first: position of its first row.
        """
        if self.pending:
            # What was judged before is computed again as it was, should the request have been preempted meanwhile.
            self.orders += [
                SteerOrder(steer, max(first, reached), END) for steer, reached in sorted(self.pending.items())
            ]
            self.pending = {}
        opened = [order for gate in self.gates if (order := gate.order(first)) is not None]
        return [*self.orders, *opened]

    def see(self, positions: npt.NDArray[np.int64], readouts: npt.NDArray[np.float32]) -> None:
        """Show rows that belong to the request for certain to its gates.

        Args:
            positions: (n,) ascending.
            readouts: (n, width of the bank).
        """
        if len(positions) == 0:
            return
        for gate in self.gates:
            gate.see(positions, readouts)
            if self.blocks is not None and gate.first_written is not None:
                self.blocks.keep_from(gate.first_written)

    def pass_by(self, position: int) -> None:
        """Rows up to a position have been read, and none of them opens anything."""
        for gate in self.gates:
            gate.seen = max(gate.seen, position + 1)

    def lose(self) -> None:
        """A step's readouts are lost: whatever a gate has found in it, nobody else gets the blocks behind."""
        for gate in self.gates:
            if self.blocks is not None:
                self.blocks.keep_from(max(gate.seen, gate.writes[0]))

    def due(
        self, positions: npt.NDArray[np.int64], readouts: npt.NDArray[np.float32]
    ) -> dict[int, npt.NDArray[np.bool_]]:
        """Which of some rows have to be written to: by the steer's position, (n,) of each."""
        found: dict[int, npt.NDArray[np.bool_]] = {}
        for order in self.orders:
            found[order.steer] = (positions >= order.start) & (positions < order.stop)
        for gate in self.gates:
            rows = gate.due(positions, readouts)
            found[gate.gate.steer] = found[gate.gate.steer] | rows if gate.gate.steer in found else rows
        return found
