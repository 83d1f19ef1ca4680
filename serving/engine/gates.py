"""Gates in a loaded model: buffers beside a steered layer, filled before a step; what the step found is carried on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from monitor.gates import SteerGate
from monitor.rule import Gate
from probes.steering.steer import END, SteerMatrix
from serving.engine import gate_op
from serving.engine.steer_order import GateOrder, StepOrders
from serving.engine.taps import TapSet


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step, as gates see them.

    Attributes:
        place, segment: (max_rows,) int64: of each row its position, and the number of its request.
    """

    place: torch.Tensor
    segment: torch.Tensor


class GateSite(nn.Module):
    """The gates of one layer's steers that are read at one tap.

    Args:
        numbers: their positions in the plan.
        gates: they.
        columns: of each, the place of its steer among those of the layer.
        readouts: what the tap writes its readouts to.
        rows: of the step.
        max_requests: the most requests of one step.
    """

    readouts: torch.Tensor
    place: torch.Tensor
    segment: torch.Tensor
    offsets: torch.Tensor
    by_token: torch.Tensor
    columns: torch.Tensor
    bar: torch.Tensor
    room: torch.Tensor
    latch: torch.Tensor

    def __init__(
        self,
        numbers: Sequence[int],
        gates: Sequence[SteerGate],
        columns: Sequence[int],
        *,
        readouts: torch.Tensor,
        rows: StepRows,
        max_requests: int,
    ) -> None:
        super().__init__()
        self.numbers = list(numbers)
        device, shape = readouts.device, (len(rows.place), len(numbers))
        buffers = {
            "readouts": readouts,
            "place": rows.place,
            "segment": rows.segment,
            "offsets": torch.tensor([gate.offset for gate in gates], device=device),
            "by_token": torch.tensor([gate.kind is Gate.TOKEN for gate in gates], device=device),
            "columns": torch.tensor(list(columns), device=device),
            "bar": torch.full(shape, float("inf"), device=device),
            "room": torch.zeros(shape, device=device),
            "latch": torch.full((max_requests, len(numbers)), END, dtype=torch.int64, device=device),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, scale: torch.Tensor, rows: int) -> None:
        """Raise ``scale`` in the rows that open gates let write to; see ``gate_op``."""
        open_gates = gate_op.gate if torch.compiler.is_compiling() else gate_op.gate_rows
        open_gates(
            self.readouts,
            self.offsets,
            self.by_token,
            self.columns,
            self.bar,
            self.room,
            self.place,
            self.segment,
            self.latch,
            scale,
            rows,
        )


class GateSet:
    """All gates of one worker.

    Where a step was scheduled before the result of the one before was known, the scheduler cannot say what that one
    has found: the first position that opened a gate is carried on here, as long as it belongs to the reply. It does
    not if the next step begins before it: then it was of a draft that has been rejected.

    Args:
        sites: of this worker.
        num_gates: of the plan.
        rows: of the step, which the sites share.
    """

    def __init__(self, sites: Sequence[GateSite], num_gates: int, rows: StepRows) -> None:
        self._sites = list(sites)
        self._num_gates = num_gates
        self._rows = rows
        self._before: Mapping[str, int] = {}
        self._armed = False

    def arm(
        self,
        orders: StepOrders,
        request_ids: Sequence[str],
        starts: torch.Tensor,
        segment: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Say what opens the gates of the next step.

        Args:
            orders: of the step's requests.
            request_ids: (R,) in the order of the rows.
            starts: (R,) first row of each, on the device.
            segment: (n,) the number of each row's request, on the device.
            positions: (n,) absolute, on the device.
        """
        watched = {name for name, found in orders.items() if any(isinstance(order, GateOrder) for order in found)}
        if not watched:
            self.disarm()
            return
        device, total = positions.device, len(positions)
        place = positions[:, None]

        def on_device(values: npt.NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        limits, scales, spans = _table(orders, request_ids, self._num_gates)
        limit, scale, reads_from, reads_to, writes_from, writes_to = (
            on_device(part)[segment] for part in (limits, scales, *spans)
        )
        bar = limit.where((place >= reads_from) & (place < reads_to), float("inf"))
        room = scale.where((place >= writes_from) & (place < writes_to), 0.0)
        self._rows.place[:total] = positions
        self._rows.segment[:total] = segment
        firsts = positions[starts][:, None]
        earlier = on_device(np.array([self._before.get(name, -1) for name in request_ids]))
        for site in self._sites:
            if device.type != "cpu":
                site.bar.fill_(float("inf"))  # a graph also computes the rows that it pads a step with
                site.room.zero_()
            site.bar[:total] = bar[:, site.numbers]
            site.room[:total] = room[:, site.numbers]
            known = site.latch[earlier.clamp(min=0)]
            holds = (earlier >= 0)[:, None] & (known < firsts)
            site.latch.fill_(END)
            site.latch[: len(request_ids)] = known.where(holds, END)
        self._before = {name: row for row, name in enumerate(request_ids) if name in watched}
        self._armed = True

    def disarm(self) -> None:
        """The next step has no gates."""
        if self._armed:
            for site in self._sites:
                site.bar.fill_(float("inf"))
                site.room.zero_()
        self._before = {}
        self._armed = False


def _table(
    orders: StepOrders, request_ids: Sequence[str], num_gates: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Per request and gate: (R, G) limits and scales, (4, R, G) where reading and writing begin and end."""
    shape = (len(request_ids), num_gates)
    limit, scale = np.full(shape, np.inf, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    spans = np.zeros((4, *shape), dtype=np.int64)
    for row, request_id in enumerate(request_ids):
        for order in orders.get(request_id, ()):
            if isinstance(order, GateOrder):
                limit[row, order.gate], scale[row, order.gate] = order.limit, 1.0
                spans[:, row, order.gate] = (*order.reads, *order.writes)
    return limit, scale, spans


def install_gates(
    taps: TapSet,
    matrices: Sequence[SteerMatrix],
    gates: Sequence[SteerGate],
    *,
    max_rows: int,
    max_requests: int,
    device: torch.device,
) -> GateSet | None:
    """Put gates beside the steered layers, before their classes are changed; None if the plan has none.

    Args:
        taps: of the model.
        matrices: what is written.
        gates: of the plan.
        max_rows: the most rows of one step.
        max_requests: the most requests of one step.
        device: of the model.
    """
    if not gates:
        return None
    rows = StepRows(*(torch.zeros(max_rows, dtype=torch.int64, device=device) for _ in range(2)))
    sites: list[GateSite] = []
    for matrix in matrices:
        numbers = [number for number, gate in enumerate(gates) if gate.steer in matrix.columns]
        numbers.sort(key=lambda number: gates[number].tap)
        beside = []
        for tap, group in groupby(numbers, key=lambda number: gates[number].tap):
            own = list(group)
            readouts: torch.Tensor = taps.module(tap).telltale_out  # type: ignore[assignment]
            columns = [matrix.columns.index(gates[number].steer) for number in own]
            found = [gates[number] for number in own]
            beside.append(GateSite(own, found, columns, readouts=readouts, rows=rows, max_requests=max_requests))
        if beside:
            taps.stack.layers[matrix.tap.layer].telltale_gates = nn.ModuleList(beside)
        sites += beside
    return GateSet(sites, len(gates), rows)
