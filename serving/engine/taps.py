"""Taps in a loaded model: buffers on chosen module instances, and the rows that a step left in them."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from probes.bank import Bank, TapMatrix
from probes.columns import direction_digest
from probes.taps import Site, Tap
from serving.engine import ops
from serving.engine.layers import LayerClass, LayerError, Stack, decoder_stack

Pick = Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]]
"""From what a module returned, the one or two tensors whose sum is read."""
_PREFIX = "telltale_"
"""Of the names of our buffers."""


@dataclass(slots=True)
class TapClock:
    """What a tap has cost in forwards that are not compiled; on a device that runs by itself, only to start it."""

    seconds: float = 0.0


class TapSet:
    """All taps of one worker.

    Every tapped module carries its weights and its output buffer as non-persistent module buffers, so that they are
    moved, slept and captured with the model, and never saved with it. A pipeline stage holds the taps of its own
    layers only; ``collect`` has the width of the whole bank on every stage.

    Args:
        bank: what is read, on all stages.
        modules: the tapped modules of this worker.
        stack: the decoder layers of this worker.
        device: of the buffers.
    """

    def __init__(self, bank: Bank, modules: Mapping[Tap, nn.Module], stack: Stack, device: torch.device) -> None:
        self.bank = bank
        self.stack = stack
        self._modules = dict(modules)
        self._device = device

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The taps on this worker, in the order of the bank."""
        return tuple(self._modules)

    @property
    def absent(self) -> tuple[Tap, ...]:
        """The taps of the bank whose layers are on other pipeline stages."""
        return tuple(tap for tap in self.bank.taps if tap not in self._modules)

    @property
    def present_columns(self) -> list[slice]:
        """The columns of a readout row that this worker fills, one slice for each of its taps."""
        step = self.bank.capacity + 1
        return [
            slice(number * step, (number + 1) * step)
            for number, tap in enumerate(self.bank.taps)
            if tap in self._modules
        ]

    def module(self, tap: Tap) -> nn.Module:
        """The module that carries a tap of this worker."""
        return self._modules[tap]

    def collect(self, num_rows: int, upstream: torch.Tensor | None = None) -> torch.Tensor:
        """The readouts of the step that ran last: (num_rows, width of the bank) float32, a fresh tensor.

        Args:
            num_rows: rows of the step.
            upstream: what the pipeline stages before this one have read, of the same width. Without it, the columns of
                taps on other stages are NaN, so that nobody can take them for readouts.

        The buffers hold NaN afterwards: rows of a tap that does not run in the next step are gaps, not old readings.
        """
        rows = self._joined(num_rows, upstream)
        for module in self._modules.values():
            out: torch.Tensor = module.telltale_out  # type: ignore[assignment]
            # Graphs also write the rows that they pad a step with; on a CPU there are none.
            (out[:num_rows] if out.device.type == "cpu" else out).fill_(float("nan"))
        return rows

    def _joined(self, num_rows: int, upstream: torch.Tensor | None) -> torch.Tensor:
        parts: list[torch.Tensor] = [module.telltale_out[:num_rows] for module in self._modules.values()]  # type: ignore[index]
        if parts and not self.absent:
            return torch.cat(parts, dim=1)
        if upstream is not None:
            rows = upstream[:num_rows].clone()
        else:
            rows = torch.full((num_rows, self.bank.width), float("nan"), dtype=torch.float32, device=self._device)
        for columns, part in zip(self.present_columns, parts, strict=True):
            rows[:, columns] = part
        return rows

    def take_seconds(self) -> float | None:
        """What the taps of this worker have cost since the call before; None where nobody can tell.

        That is in compiled forwards, in graphs, and on devices that run by themselves: there only a benchmark tells.
        """
        clocks: list[TapClock] = [module.telltale_clock for module in self._modules.values()]  # type: ignore[misc]
        spent = sum(clock.seconds for clock in clocks)
        for clock in clocks:
            clock.seconds = 0.0
        return spent if spent and self._device.type == "cpu" else None

    @property
    def nbytes(self) -> int:
        """Memory of all buffers of this worker, on its device."""
        buffers = [
            buffer
            for module in self._modules.values()
            for name, buffer in module.named_buffers(recurse=False)
            if name.startswith(_PREFIX)
        ]
        return sum(buffer.nbytes for buffer in buffers)

    def resident(self) -> dict[str, str]:
        """Digest of what each tap of this worker multiplies with, read back from the device, by the tap's name."""
        digests = {}
        for tap, module in self._modules.items():
            weight: torch.Tensor = module.telltale_weight  # type: ignore[assignment]
            bias: torch.Tensor = module.telltale_bias  # type: ignore[assignment]
            matrix = TapMatrix(tap, weight.cpu().numpy(), bias.cpu().numpy(), np.arange(weight.shape[1]))
            digests[str(tap)] = matrix.digest()
        return digests

    @torch.inference_mode()
    def write(self, tap: Tap, columns: Sequence[int], weight: torch.Tensor, bias: torch.Tensor) -> list[str] | None:
        """Put directions into columns that nothing reads yet, between two steps.

        Args:
            tap: where.
            columns: (k,) counted from the tap's first.
            weight: (d_model, k) float32.
            bias: (k,) float32.
        Returns: the digests of what stands there now, read back from the device; None if the tap is on another worker.
        """
        module = self._modules.get(tap)
        if module is None:
            return None
        held: tuple[torch.Tensor, torch.Tensor] = module.telltale_weight, module.telltale_bias  # type: ignore[assignment]
        places = torch.tensor(columns, dtype=torch.int64, device=held[0].device)
        held[0].index_copy_(1, places, weight.to(held[0].device))
        held[1].index_copy_(0, places, bias.to(held[1].device))
        found, offsets = held[0].index_select(1, places).cpu().numpy(), held[1].index_select(0, places).cpu().numpy()
        return [direction_digest(tap, found[:, number], offsets[number]) for number in range(len(columns))]

    def fired(self) -> dict[str, int]:
        """How often each tap of this worker has run, by its name."""
        return {str(tap): int(module.telltale_fired.item()) for tap, module in self._modules.items()}  # type: ignore[operator]

    def clear(self) -> None:
        """Forget what was read so far: no tap has fired, and no row was written."""
        for module in self._modules.values():
            module.telltale_out.fill_(float("nan"))  # type: ignore[operator]
            module.telltale_fired.zero_()  # type: ignore[operator]


def install_taps(model: nn.Module, bank: Bank, *, num_layers: int, max_rows: int, device: torch.device) -> TapSet:
    """Tap what the bank reads, as far as it is on this worker. Modules that are not read stay as they were.

    Args:
        model: loaded, before its first forward.
        bank: what to read.
        num_layers: decoder layers of the model.
        max_rows: the most rows of one step.
        device: of the model.
    Raises:
        LayerError: the layers are not known, or a module that is to be tapped is not where its class has it.
    """
    stack = decoder_stack(model, num_layers)
    tapped: dict[Tap, nn.Module] = {}
    for matrix in bank.matrices:
        layer = stack.layers.get(matrix.tap.layer)
        if layer is None:
            continue
        module, pick = place_of(layer, matrix.tap.site, stack.known)
        _tap(module, pick, matrix, max_rows=max_rows, device=device)
        tapped[matrix.tap] = module
    return TapSet(bank, tapped, stack, device)


def output_of(output: Any) -> tuple[torch.Tensor, None]:
    """What an attention or MLP module returned; transformers' modules return further things behind it.

    Raises:
        LayerError: it is no tensor and begins with none.
    """
    value = output[0] if isinstance(output, tuple) else output
    if not isinstance(value, torch.Tensor):
        raise LayerError(f"a module returned a {type(value).__name__} where its output was to be read.")
    return value, None


def rows_of(value: torch.Tensor) -> torch.Tensor:
    """(n, d_model), without the batch dimension that transformers' layers have in front."""
    return value if value.dim() <= 2 else value.flatten(0, -2)  # noqa: PLR2004


def place_of(layer: nn.Module, site: Site, known: LayerClass) -> tuple[nn.Module, Pick]:
    """The module of a layer that a site is read at, and where in its output.

    Raises:
        LayerError: it is not where its class has it.
    """
    if site is Site.RESID_POST:
        return layer, known.convention.stream
    name = known.attention if site is Site.ATTN_OUT else known.mlp
    module = getattr(layer, name, None)
    if not isinstance(module, nn.Module):
        raise LayerError(f"{type(layer).__name__} has no module {name!r} to read {site.value} from.")
    return module, output_of


def tap_buffers(matrix: TapMatrix, *, max_rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """All memory of one tap, by the names of the buffers; on the ``meta`` device, its size alone.

    Args:
        matrix: what the tap multiplies with.
        max_rows: the most rows of one step.
        device: where.
    """
    width = matrix.weight.shape[1]
    return {
        f"{_PREFIX}weight": torch.from_numpy(matrix.weight.copy()).to(device),
        f"{_PREFIX}bias": torch.from_numpy(matrix.bias.copy()).to(device),
        f"{_PREFIX}out": torch.full((max_rows, width + 1), float("nan"), dtype=torch.float32, device=device),
        f"{_PREFIX}fired": torch.zeros(1, dtype=torch.int64, device=device),
    }


def _tap(module: nn.Module, pick: Pick, matrix: TapMatrix, *, max_rows: int, device: torch.device) -> None:
    for name, buffer in tap_buffers(matrix, max_rows=max_rows, device=device).items():
        module.register_buffer(name, buffer, persistent=False)
    module.telltale_clock = TapClock()  # type: ignore[assignment]
    # The class of this instance alone: draft models reuse the class, and must not be read.
    module.__class__ = _tapped_class(module, pick)


def _tapped_class(module: nn.Module, pick: Pick) -> type[nn.Module]:
    cls, inner = type(module), own_forward(module)

    @functools.wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = inner(self, *args, **kwargs)
        hidden, residual = pick(output)
        compiling = torch.compiler.is_compiling()
        read: Callable[..., None] = ops.read if compiling else ops.read_rows
        began = 0.0 if compiling else time.perf_counter()
        read(
            rows_of(hidden),
            None if residual is None else rows_of(residual),
            self.telltale_weight,
            self.telltale_bias,
            self.telltale_out,
            self.telltale_fired,
        )
        if not compiling:
            clock: TapClock = self.telltale_clock  # type: ignore[assignment]
            clock.seconds += time.perf_counter() - began
        return output

    return type(f"Tapped{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__})


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module that ours is put around: its class's, or one that was bound to this module alone.

    Raises:
        LayerError: the module has the forward of another object.
    """
    cls = type(module)
    inner: Callable[..., Any] = cls.forward
    # vLLM binds rewritten forwards to single modules of transformers; such a forward would hide the tap's.
    bound = vars(module).pop("forward", None)
    if bound is not None:
        if not inspect.ismethod(bound) or bound.__self__ is not module:
            raise LayerError(f"{cls.__name__} has a forward of another object, which cannot be tapped.")
        inner = bound.__func__
    return inner
