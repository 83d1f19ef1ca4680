"""Taps in a loaded model: buffers on chosen layer instances, and the rows that a step left in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from probes.bank import Bank, TapMatrix
from probes.taps import Tap
from serving.engine import ops
from serving.engine.layers import Convention, LayerError, convention_of, decoder_layers


class TapSet:
    """All taps of one worker.

    Every tapped layer carries its weights and its output buffer as non-persistent module buffers, so that they are
    moved, slept and captured with the model, and never saved with it.
    """

    def __init__(self, layers: Sequence[tuple[Tap, nn.Module]]) -> None:
        self._layers = tuple(layers)

    def collect(self, num_rows: int) -> torch.Tensor:
        """The readouts of the step that ran last: (num_rows, width of the bank) float32, a fresh tensor.

        The buffers hold NaN afterwards: rows of a tap that does not run in the next step are gaps, not old readings.
        """
        readouts = torch.cat([layer.telltale_out[:num_rows] for _, layer in self._layers], dim=1)  # type: ignore[index]
        for _, layer in self._layers:
            out: torch.Tensor = layer.telltale_out  # type: ignore[assignment]
            # Graphs also write the rows that they pad a step with; on a CPU there are none.
            (out[:num_rows] if out.device.type == "cpu" else out).fill_(float("nan"))
        return readouts

    def resident(self) -> dict[str, str]:
        """Digest of what each tap multiplies with, read back from the device, by the tap's name."""
        digests = {}
        for tap, layer in self._layers:
            weight: torch.Tensor = layer.telltale_weight  # type: ignore[assignment]
            bias: torch.Tensor = layer.telltale_bias  # type: ignore[assignment]
            matrix = TapMatrix(tap, weight.cpu().numpy(), bias.cpu().numpy(), weight.shape[1])
            digests[str(tap)] = matrix.digest()
        return digests

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
        LayerError: the layers are not known, or a tapped layer is not on this worker.
    """
    layers = decoder_layers(model, num_layers)
    tapped = []
    for matrix in bank.matrices:
        layer = layers[matrix.tap.layer]
        _tap(layer, matrix, max_rows=max_rows, device=device)
        tapped.append((matrix.tap, layer))
    return TapSet(tapped)


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
