"""How good an autoencoder is on text that it was not trained on, beside random directions that are as sparse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probes.card import ModelRef
from probes.sae.sae import Sae
from probes.sae.train.material import Material
from probes.sae.train.random_directions import random_directions
from probes.sae.train.reconstruction import Reconstruction, measure_reconstruction
from probes.sae.train.rows import Float32
from probes.sae.train.spliced import SplicedModel

__all__ = ["evaluate_sae", "measure_without_model"]

_CONTROL_ROWS = 8192
_DIGITS = 4


def evaluate_sae(
    sae: Sae, material: Material, *, model_dir: Path, model: ModelRef, seed: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """The figures that stand on the card, all on held-out requests.

    ``ce_recovered`` is ``(CE(0) - CE(s')) / (CE(0) - CE(s))``: 1 where the reconstruction s' serves the model as well
    as the row s, 0 where it serves it no better than a row of zeros; ``ce_recovered_from_mean`` is the same with the
    mean row in the place of zeros, which is harder.

    Args:
        sae: as it is served.
        material: what it is measured on; the control is fitted on training rows.
        model_dir: folder in transformers' layout.
        model: which model that is.
        seed: of the control.
        progress: told what is being done.
    """
    progress("measuring the reconstruction")
    sides = _Sides.of(sae, material, seed)
    mean = sides.fitted_on.mean(axis=0, dtype=np.float64).astype(np.float32)
    progress("measuring the model's cross entropy with the reconstruction in the place of the stream")
    model_spliced = SplicedModel(
        model_dir, model=model, tap=sae.tap, skip_first=material.skip_first, max_norm=material.max_norm
    )
    losses = model_spliced.cross_entropies(
        material.held_out,
        {
            "original": None,
            "reconstruction": sae.reconstruct,
            "zero_ablation": np.zeros_like,
            "mean_ablation": lambda rows: _repeated(mean, rows),
            "random_directions": sides.control.reconstruct,
        },
    )
    figures = sides.figures()
    _add_recovered(figures, losses, "reconstruction")
    _add_recovered(figures["controls"]["random_directions"], losses, "random_directions")
    return figures | {
        "predictions": model_spliced.predictions(material.held_out),
        "ce": {name: round(loss, _DIGITS) for name, loss in losses.items()},
    }


def measure_without_model(sae: Sae, material: Material, *, seed: int) -> dict[str, Any]:
    """The figures that need no model: ``fvu``, ``l0`` and ``dead_share``, of the autoencoder and of the control."""
    return _Sides.of(sae, material, seed).figures()


@dataclass(frozen=True, slots=True, eq=False)
class _Sides:
    """An autoencoder and its control, on the held-out rows."""

    fitted_on: Float32
    control: Sae
    of_sae: Reconstruction
    of_control: Reconstruction

    @classmethod
    def of(cls, sae: Sae, material: Material, seed: int) -> _Sides:
        fitted_on = material.train.sample(_CONTROL_ROWS, seed)
        found = measure_reconstruction(sae, material.held_out_rows)
        control = random_directions(fitted_on, tap=sae.tap, width=sae.width, l0=found.l0, seed=seed)
        return cls(fitted_on, control, found, measure_reconstruction(control, material.held_out_rows))

    def figures(self) -> dict[str, Any]:
        return {
            **_of(self.of_sae),
            "rows": self.of_sae.rows,
            "controls": {"random_directions": _of(self.of_control)},
        }


def _of(found: Reconstruction) -> dict[str, float]:
    return {
        "fvu": round(found.fvu, _DIGITS),
        "l0": round(found.l0, _DIGITS),
        "dead_share": round(found.dead_share, _DIGITS),
    }


def _add_recovered(figures: dict[str, Any], losses: Mapping[str, float], name: str) -> None:
    for key, floor in (("ce_recovered", "zero_ablation"), ("ce_recovered_from_mean", "mean_ablation")):
        worst = losses[floor]
        figures[key] = round((worst - losses[name]) / (worst - losses["original"]), _DIGITS)


def _repeated(row: Float32, rows: Float32) -> Float32:
    return np.broadcast_to(row, rows.shape).copy()
