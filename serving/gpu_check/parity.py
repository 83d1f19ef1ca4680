"""Readouts of an engine against transformers: how far off they are, and how far is allowed. Starts no engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from probes.bank import Bank
from serving.gpu_check import GpuCheckError

Float64 = npt.NDArray[np.float64]
FACTOR = 4.0
"""Times what transformers itself is off in the engine's dtype: other kernels round elsewhere, but not worse."""
FLOOR = 1e-3
"""Of the spread of a direction over a text; float32 engines and float32 transformers stay below it."""
SINK_FLOOR = 1e-5
"""Of the norm of a text's first row, which is a hundred times the others'."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One text.

    Attributes:
        row: the largest distance of a row, root mean square over directions, in units of their spread.
        row_allowed: of that.
        sink: the largest error of the first row's products, in units of its norm.
        sink_allowed: of that.
        norm: the largest relative error of a squared norm.
        norm_allowed: of that.
        shifted: the smallest distance that a row would have from its neighbour: what a wrong row looks like.
    """

    row: float
    row_allowed: float
    sink: float
    sink_allowed: float
    norm: float
    norm_allowed: float
    shifted: float


class Reference:
    """transformers' own forward pass, in float32 and in the engine's dtype.

    Args:
        folder: of the model.
        bank: directions.
        dtype: of the engine, e.g. ``bfloat16``.
        device: where transformers runs.
    Raises:
        GpuCheckError: the model keeps its decoder layers where they are not looked for.
    """

    def __init__(self, folder: Path, bank: Bank, *, dtype: str, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self._bank = bank
        self._device = device
        self._networks = []
        for kind in dict.fromkeys((torch.float32, getattr(torch, dtype))):
            network = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager")
            self._networks.append(network.eval().to(device))
        self._streams: dict[int, torch.Tensor] = {}
        for network in self._networks:
            layers = getattr(getattr(network, "model", None), "layers", None)
            if layers is None:
                raise GpuCheckError(f"{type(network).__name__} has no model.layers to compare with. Use another model.")
            for matrix in bank.matrices:
                layers[matrix.tap.layer].register_forward_hook(self._keep(matrix.tap.layer))

    def readouts(self, tokens: npt.NDArray[np.integer]) -> tuple[Float64, Float64]:
        """The rows of a text: (n, width of the bank) from float32, and from the engine's dtype."""
        results = []
        for network in self._networks:
            self._streams.clear()
            with torch.inference_mode():
                network(torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(self._device)[None])
            parts = []
            for matrix in self._bank.matrices:
                stream = self._streams[matrix.tap.layer].double().cpu().numpy()
                products = stream @ matrix.weight.astype(np.float64) + matrix.bias.astype(np.float64)
                parts += [products, np.square(stream).sum(axis=1, keepdims=True)]
            results.append(np.concatenate(parts, axis=1))
        return results[0], results[-1]

    def _keep(self, layer: int) -> Any:
        def hook(module: object, inputs: object, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            self._streams[layer] = state.reshape(-1, state.shape[-1])

        return hook


def agreement(bank: Bank, found: npt.NDArray[np.floating], *, exact: Float64, same_dtype: Float64) -> Agreement:
    """Compare the rows of one text.

    Args:
        bank: whose columns they have.
        found: (n, width) of the engine.
        exact: of transformers in float32.
        same_dtype: of transformers in the engine's dtype.
    """
    if found.shape != exact.shape or not np.isfinite(found[:, bank.used_columns()]).all():
        infinite = float("inf")
        return Agreement(infinite, FLOOR, infinite, SINK_FLOOR, infinite, FLOOR, infinite)
    products, norms = _columns(bank)
    spread = np.maximum(exact[1:, products].std(axis=0), 1e-6)

    def rows(one: npt.NDArray[np.floating], other: npt.NDArray[np.floating]) -> Float64:
        distances: Float64 = np.sqrt(np.square((one[:, products] - other[:, products]) / spread).mean(axis=1))
        return distances

    def sink(one: npt.NDArray[np.floating]) -> float:
        error = np.abs(one[0] - exact[0])
        return max(
            float(error[columns].max() / np.sqrt(exact[0, norm])) for norm, columns in _by_tap(bank)
        )  # fmt: skip

    def norm(one: npt.NDArray[np.floating]) -> float:
        return float(np.abs(one[:, norms] / exact[:, norms] - 1).max())

    return Agreement(
        row=float(rows(found[1:], exact[1:]).max()),
        row_allowed=max(FACTOR * float(rows(same_dtype[1:], exact[1:]).max()), FLOOR),
        sink=sink(found),
        sink_allowed=max(FACTOR * sink(same_dtype), SINK_FLOOR),
        norm=norm(found),
        norm_allowed=max(FACTOR * norm(same_dtype), FLOOR),
        shifted=float(rows(exact[2:], exact[1:-1]).min()),
    )


def drift(bank: Bank, one: npt.NDArray[np.floating], other: npt.NDArray[np.floating]) -> float:
    """The largest distance between two captures of the same rows, in the unit of ``Agreement.row``."""
    products, _ = _columns(bank)
    spread = np.maximum(one[1:, products].astype(np.float64).std(axis=0), 1e-6)
    return float(np.sqrt(np.square((one[1:, products] - other[1:, products]) / spread).mean(axis=1)).max())


def _columns(bank: Bank) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    norms = np.array([bank.norm_column(tap) for tap in bank.taps], dtype=np.intp)
    return np.setdiff1d(bank.used_columns(), norms), norms


def _by_tap(bank: Bank) -> list[tuple[int, npt.NDArray[np.intp]]]:
    products, norms = _columns(bank)
    return [(int(norm), products[(products < norm) & (products >= norm - bank.capacity)]) for norm in norms]
