"""Whole rows of a loaded model's residual stream, a few of a step: asked for before it, taken out after it.

What is read for detectors are a few numbers of each row. To explain a flag the whole row is needed, of some tokens of
the requests that our own front end has computed once more for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from probes.taps import Tap
from serving.engine import pick_op
from serving.engine.pick_order import MAX_PICKS, PickOrders, Wanted
from serving.engine.runtime import load_worker_plan
from serving.engine.taps import Pick, TapSet, own_forward, place_of, rows_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PREFIX = "telltale_pick_"
"""Of the names of our buffers."""


class Picked(NamedTuple):
    """What a step has left, on the device: (len(wanted), d_model) float32, owned by nobody else."""

    wanted: Wanted
    rows: torch.Tensor


class PickSet:
    """The one module of a worker whose rows can be picked.

    Args:
        module: it; carries the buffers.
        device: of the buffers.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module: Any = module  # what stands on a module has no type of its own
        self._device = device
        self._wanted: Wanted = ()
        self._found: torch.Tensor | None = None

    def arm(
        self, orders: PickOrders, request_ids: Sequence[str], starts: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Say which rows of the next step are wanted.

        Args:
            orders: of the step's requests.
            request_ids: (R,) in the order of the rows.
            starts: (R + 1,) int: request i has the rows from starts[i] to starts[i + 1].
            positions: (n,) absolute. Both on the device: only there are they certain under asynchronous scheduling.
        """
        number = {name: place for place, name in enumerate(request_ids)}
        wanted = [(name, place) for name, places in orders.items() if name in number for place in places]
        self._wanted = tuple(wanted[:MAX_PICKS])
        self._module.telltale_pick_armed = bool(self._wanted)
        if not self._wanted:
            self._found = None
            return
        owners = self._on_device([number[name] for name, _ in self._wanted])
        places = self._on_device([place for _, place in self._wanted])
        rows = torch.arange(len(positions), device=positions.device)
        first, stop = (starts.to(torch.int64)[owners + end][:, None] for end in (0, 1))
        match = (rows >= first) & (rows < stop) & (positions[None] == places[:, None])
        self._found = match.any(dim=1)
        index: torch.Tensor = self._module.telltale_pick_index
        index[: len(self._wanted)] = match.to(torch.int8).argmax(dim=1)

    def collect(self) -> Picked | None:
        """What the step that ran last has left; None without orders.

        The buffer holds NaN afterwards: rows of a layer that does not run in the next step are not taken for new ones.
        """
        if self._found is None:
            return None
        picked: torch.Tensor = self._module.telltale_pick_rows
        rows = picked[: len(self._wanted)].where(self._found[:, None], torch.nan)
        picked.fill_(torch.nan)
        return Picked(self._wanted, rows)

    def _on_device(self, values: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self._device, non_blocking=True)


def make_pickable(taps: TapSet, vllm_config: VllmConfig, *, device: torch.device) -> PickSet | None:
    """Make a tapped model's rows pickable as its engine's plan says; None if nobody will ask.

    Comes after the taps and before the steers, so that rows are picked before they are written to.

    Args:
        taps: of the model.
        vllm_config: of the engine.
        device: of the model.
    Raises:
        LayerError: the module is not where its class has it.
    """
    tap = load_worker_plan(vllm_config).pick
    return None if tap is None else install_pick(taps, tap, d_model=taps.bank.d_model, device=device)


def install_pick(taps: TapSet, tap: Tap, *, d_model: int, device: torch.device) -> PickSet | None:
    """Make one tap's rows pickable; None where its layer is on another worker.

    Args:
        taps: of the model.
        tap: whose rows.
        d_model: width of the residual stream.
        device: of the model.
    Raises:
        LayerError: see ``make_pickable``.
    """
    layer = taps.stack.layers.get(tap.layer)
    if layer is None:
        return None
    module, stream = place_of(layer, tap.site, taps.stack.known)
    rows = torch.full((MAX_PICKS, d_model), torch.nan, dtype=torch.float32, device=device)
    module.register_buffer(f"{_PREFIX}rows", rows, persistent=False)
    index = torch.zeros(MAX_PICKS, dtype=torch.int64, device=device)
    module.register_buffer(f"{_PREFIX}index", index, persistent=False)
    made: Any = module
    made.telltale_pick_armed = False
    made.__class__ = _picked_class(module, stream)
    return PickSet(module, device)


def _picked_class(module: nn.Module, stream: Pick) -> type[nn.Module]:
    cls, inner = type(module), own_forward(module)

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(self, *args, **kwargs)
        hidden, residual = stream(output)
        compiling = torch.compiler.is_compiling()
        # A CUDA graph would keep what was true when it was captured; an eager step on a CPU is asked each time.
        if not compiling and not self.telltale_pick_armed and hidden.device.type == "cpu":
            return output
        pick: Callable[..., None] = pick_op.pick if compiling else pick_op.pick_rows
        pick(
            rows_of(hidden),
            None if residual is None else rows_of(residual),
            self.telltale_pick_index,
            self.telltale_pick_rows,
        )
        return output

    return type(f"Picked{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__})
