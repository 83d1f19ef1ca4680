"""Steers in a loaded model: buffers on the layers that are written to, filled before a step, read after it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from probes.steering.steer import SteerMatrix
from probes.taps import Tap
from serving.engine import steer_op
from serving.engine.gates import GateSet, install_gates
from serving.engine.layers import LayerClass, Stack
from serving.engine.runtime import load_worker_plan
from serving.engine.steer_order import SteerOrder, StepOrders
from serving.engine.taps import TapSet, rows_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PREFIX = "telltale_steer_"
"""Of the names of our buffers."""


class SteerSet:
    """All steers of one worker.

    Args:
        matrices: what is written, on all stages.
        modules: the layers of this worker that are written to.
        num_steers: of the plan.
        device: of the buffers.
        gates: before them.
    """

    def __init__(
        self,
        matrices: Sequence[SteerMatrix],
        modules: Mapping[Tap, nn.Module],
        num_steers: int,
        device: torch.device,
        gates: GateSet | None = None,
    ) -> None:
        # Any: what stands on a layer has no type of its own.
        self._sites: list[tuple[Any, list[int]]] = [
            (modules[matrix.tap], list(matrix.columns)) for matrix in matrices if matrix.tap in modules
        ]
        self._num_steers = num_steers
        self._device = device
        self._gates = gates
        self._armed = False

    def arm(
        self,
        orders: StepOrders,
        request_ids: Sequence[str],
        starts: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Say which rows of the next step are written to.

        Args:
            orders: of the step's requests.
            request_ids: (R,) in the order of the rows.
            starts: (R + 1,) int: request i has the rows from starts[i] to starts[i + 1].
            positions: (n,) absolute. Both on the device: only there are they certain under asynchronous scheduling.
        """
        if not orders:
            if self._gates is not None:
                self._gates.disarm()
            self._disarm()
            return
        rows_before = starts.to(torch.int64)
        segment = torch.searchsorted(rows_before[1:], torch.arange(len(positions), device=positions.device), right=True)
        if self._gates is not None:
            self._gates.arm(orders, request_ids, rows_before[:-1], segment, positions)
        shape = (len(request_ids), self._num_steers)
        scale, start, stop = np.zeros(shape, dtype=np.float32), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, request_id in enumerate(request_ids):
            for order in orders.get(request_id, ()):
                if isinstance(order, SteerOrder):
                    cell = row, order.steer
                    # Two rules may have switched on one steer, each from its own position on.
                    start[cell] = min(order.start, start[cell]) if scale[cell] else order.start
                    scale[cell], stop[cell] = max(order.scale, scale[cell]), max(order.stop, stop[cell])
        spread = [self._on_device(values)[segment] for values in (scale, start, stop)]
        place = positions[:, None]
        rows = spread[0].where((place >= spread[1]) & (place < spread[2]), 0.0)
        for module, columns in self._sites:
            buffer = module.get_buffer(f"{_PREFIX}scale")
            if buffer.device.type != "cpu":
                buffer.zero_()  # a graph also computes the rows that it pads a step with
            buffer[: len(rows)] = rows[:, columns]
            module.telltale_steer_armed = True
        self._armed = True

    def collect(self, num_rows: int) -> torch.Tensor | None:
        """How far each row of the step that ran last was moved: (num_rows, steers) float32; None if nothing was armed.

        NaN where a layer that should have been written to did not run. The buffers hold NaN afterwards.
        """
        if not self._armed:
            return None
        doses = torch.zeros((num_rows, self._num_steers), dtype=torch.float32, device=self._device)
        for module, columns in self._sites:
            dose = module.get_buffer(f"{_PREFIX}dose")
            doses[:, columns] = dose[:num_rows]
            dose.fill_(float("nan"))
        return doses

    def _disarm(self) -> None:
        if self._armed:
            for module, _ in self._sites:
                module.get_buffer(f"{_PREFIX}scale").zero_()
                module.telltale_steer_armed = False
        self._armed = False

    def _on_device(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def make_writable(taps: TapSet, vllm_config: VllmConfig, *, max_rows: int, device: torch.device) -> SteerSet | None:
    """Make the layers of a tapped model writable as its engine's plan says; None if it has no steers.

    Args:
        taps: of the model.
        vllm_config: of the engine.
        max_rows: the most rows of one step.
        device: of the model.
    """
    steering = load_worker_plan(vllm_config).steering
    if not steering.steers:
        return None
    requests = vllm_config.scheduler_config.max_num_seqs
    gates = install_gates(
        taps, steering.matrices, steering.gates, max_rows=max_rows, max_requests=requests, device=device
    )
    return install_steers(
        taps.stack, steering.matrices, num_steers=len(steering.steers), max_rows=max_rows, device=device, gates=gates
    )


def install_steers(
    stack: Stack,
    matrices: Sequence[SteerMatrix],
    *,
    num_steers: int,
    max_rows: int,
    device: torch.device,
    gates: GateSet | None = None,
) -> SteerSet:
    """Make layers writable, as far as they are on this worker; after the taps, so that reads come before writes.

    Args:
        stack: the decoder layers of this worker.
        matrices: what is written.
        num_steers: of the plan.
        max_rows: the most rows of one step.
        device: of the model.
        gates: of the model, put in place.
    """
    modules: dict[Tap, nn.Module] = {}
    layer: Any
    for matrix in matrices:
        layer = stack.layers.get(matrix.tap.layer)
        if layer is None:
            continue
        for name, buffer in steer_buffers(matrix, max_rows=max_rows, device=device).items():
            layer.register_buffer(name, buffer, persistent=False)
        layer.telltale_steer_armed = False
        layer.__class__ = _steered_class(type(layer), stack.known)
        modules[matrix.tap] = layer
    return SteerSet(matrices, modules, num_steers, device, gates)


def steer_buffers(matrix: SteerMatrix, *, max_rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """All memory of the steers after one layer, by the names of the buffers.

    Args:
        matrix: what is written.
        max_rows: the most rows of one step.
        device: where.
    """
    shape = (max_rows, len(matrix.columns))
    return {
        f"{_PREFIX}read": torch.from_numpy(matrix.read.copy()).to(device),
        f"{_PREFIX}terms": torch.from_numpy(matrix.terms.copy()).to(device),
        f"{_PREFIX}write": torch.from_numpy(matrix.write.copy()).to(device),
        f"{_PREFIX}scale": torch.zeros(shape, dtype=torch.float32, device=device),
        f"{_PREFIX}dose": torch.full(shape, float("nan"), dtype=torch.float32, device=device),
    }


def _steered_class(cls: type[nn.Module], known: LayerClass) -> type[nn.Module]:
    inner: Callable[..., Any] = cls.forward
    convention = known.convention

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(self, *args, **kwargs)
        hidden, residual = convention.stream(output)
        compiling = torch.compiler.is_compiling()
        # A CUDA graph would keep what was true when it was captured; an eager step on a CPU is asked each time.
        if not compiling and not self.telltale_steer_armed and hidden.device.type == "cpu":
            return output
        for gate in getattr(self, "telltale_gates", ()):
            gate(self.telltale_steer_scale, rows_of(hidden).shape[0])
        write = steer_op.steer if compiling else steer_op.steer_rows
        changed = write(
            rows_of(hidden),
            None if residual is None else rows_of(residual),
            self.telltale_steer_read,
            self.telltale_steer_terms,
            self.telltale_steer_write,
            self.telltale_steer_scale,
            self.telltale_steer_dose,
        )
        return convention.replaced(output, changed.view_as(hidden))

    return type(f"Steered{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__})
