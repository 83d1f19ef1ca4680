"""Taps in a loaded model: buffers on chosen layer instances, and the rows that a step left in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer

from probes.bank import Bank, TapMatrix
from probes.taps import Tap
from serving.engine import ops
from serving.engine.layers import Convention, LayerError, convention_of, decoder_layers


class TapSet:
    """All taps of one worker.

    Every tapped layer carries its weights and its output buffer as non-persistent module buffers, so that they are
    moved, slept and captured with the model, and never saved with it.
    """

    def __init__(self, layers: Sequence[tuple[Tap, nn.Module | None]], *, width: int, device: torch.device) -> None:
        self._layers = tuple((tap, layer) for tap, layer in layers if layer is not None)
        self._pieces = tuple(layer for _, layer in layers)
        self._width = width
        self._device = device
        present = [torch.full((width,), layer is not None, device=device) for layer in self._pieces]
        self.present = torch.cat(present) if present else torch.zeros(0, dtype=torch.bool, device=device)

    def collect(self, num_rows: int) -> torch.Tensor:
        """The readouts of the step that ran last: (num_rows, width of the bank) float32, a fresh tensor.

        Columns of taps on other pipeline stages are NaN, so that nobody can take them for readouts.
        """
        absent = torch.full((num_rows, self._width), float("nan"), device=self._device)
        return torch.cat(
            [absent if layer is None else layer.telltale_out[:num_rows] for layer in self._pieces],  # type: ignore[index]
            dim=1,
        )

    def fired(self) -> dict[str, int]:
        """How often each tap has run, by its name."""
        return {str(tap): int(layer.telltale_fired.item()) for tap, layer in self._layers}  # type: ignore[operator]


def install_taps(model: nn.Module, bank: Bank, *, num_layers: int, max_rows: int, device: torch.device) -> TapSet:
    """Tap the layers that the bank reads. Layers that are not read stay as they were.

    Args:
        model: loaded, before its first forward.
        bank: what to read.
        num_layers: decoder layers of the model.
        max_rows: the most rows of one step.
        device: of the model.
    Raises:
        LayerError: the layers are not known.
    """
    layers = decoder_layers(model, num_layers)
    tapped: list[tuple[Tap, nn.Module | None]] = []
    for matrix in bank.matrices:
        layer = layers[matrix.tap.layer]
        here = not isinstance(layer, PPMissingLayer)
        if here:
            _tap(layer, matrix, max_rows=max_rows, device=device)
        tapped.append((matrix.tap, layer if here else None))
    return TapSet(tapped, width=bank.capacity + 1, device=device)


def _tap(layer: nn.Module, matrix: TapMatrix, *, max_rows: int, device: torch.device) -> None:
    convention = convention_of(layer)
    width = matrix.weight.shape[1]
    buffers = {
        "telltale_weight": torch.from_numpy(matrix.weight.copy()).to(device),
        "telltale_bias": torch.from_numpy(matrix.bias.copy()).to(device),
        "telltale_out": torch.full((max_rows, width + 1), float("nan"), dtype=torch.float32, device=device),
        "telltale_fired": torch.zeros(1, dtype=torch.int64, device=device),
    }
    for name, buffer in buffers.items():
        layer.register_buffer(name, buffer, persistent=False)
    # The class of this instance alone: draft models reuse the class, and must not be read.
    layer.__class__ = _tapped_class(type(layer), convention)


def _tapped_class(cls: type[nn.Module], convention: Convention) -> type[nn.Module]:
    if convention is not Convention.FUSED:  # pragma: no cover - the enum has one member
        raise LayerError(f"{cls.__name__}: no tap is written for the convention {convention.value!r}.")

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden, residual = cls.forward(self, *args, **kwargs)
        ops.read(hidden, residual, self.telltale_weight, self.telltale_bias, self.telltale_out, self.telltale_fired)
        return hidden, residual

    return type(f"Tapped{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__})
