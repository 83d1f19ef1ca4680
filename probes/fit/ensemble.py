"""A layer ensemble: a linear probe at each of several taps, their scores in common units and averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.fit.fitters import Fitter
from probes.fit.linear_probe import Float64, Floats, Labels, LinearProbe
from probes.taps import Tap

__all__ = ["EnsembleProbe", "fit_ensemble"]


@dataclass(frozen=True, slots=True, eq=False)
class EnsembleProbe:
    """The probes of several taps and what each of them counts.

    Attributes:
        members: by tap.
        share: by tap.
    """

    members: Mapping[Tap, LinearProbe]
    share: Mapping[Tap, float]

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """As an artifact of kind ``ensemble`` holds them, in the order of ``members``."""
        parts = [probe.tensors() for probe in self.members.values()]
        stacked = {name: np.stack([part[name] for part in parts]) for name in ("direction", "mean", "scale")}
        share = np.array([self.share[tap] for tap in self.members], dtype=np.float32)
        return {**stacked, "bias": np.concatenate([part["bias"] for part in parts]), "share": share}

    def score(self, features: Mapping[Tap, Floats]) -> Float64:
        """Map (n, d_model) of each tap to (n,)."""
        shares = {tap: float(np.float32(share)) for tap, share in self.share.items()}
        found: Float64 = np.sum([shares[tap] * probe.score(features[tap]) for tap, probe in self.members.items()], 0)
        return found


def fit_ensemble(features: Mapping[Tap, Floats], labels: Labels, fitter: Fitter) -> EnsembleProbe:
    """Fit at each tap by itself; every one then counts alike, in units of its scores' spread.

    The equal share is no oversight: weights that were fitted on the same rows favour the tap that overfits most.

    Args:
        features: (n, d_model) at each tap.
        labels: (n,), 0 or 1, both present.
        fitter: of each member.
    """
    members = {tap: fitter.fit(rows, labels) for tap, rows in features.items()}
    spread = {tap: float(np.std(probe.score(features[tap]))) or 1.0 for tap, probe in members.items()}
    return EnsembleProbe(members, {tap: 1.0 / (len(members) * spread[tap]) for tap in members})
