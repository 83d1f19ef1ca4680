"""A layer ensemble: a linear probe at each of several taps, their scores in common units and averaged.

While it is fitted, it is one linear probe on the taps' activations side by side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from probes.fit.fitters.base import Fitter
from probes.fit.training.linear_probe import Floats, Labels, LinearProbe

__all__ = ["SideBySide", "ensemble_tensors"]


class SideBySide(Fitter):
    """Fits at each tap by itself; every one then counts alike, in units of its scores' spread.

    The equal share is no oversight: weights that were fitted on the same rows favour the tap that overfits most.
    """

    kind = "side_by_side"

    member: Fitter
    """Of each tap's probe."""
    taps: int
    """How many stand side by side."""

    def fit(self, features: Floats, labels: Labels) -> LinearProbe:
        """Fit.

        Args:
            features: (n, taps * d_model), finite.
            labels: (n,), 0 or 1, both present.
        """
        parts = np.split(features, self.taps, axis=1)
        members = [self.member.fit(part, labels) for part in parts]
        spread = [float(np.std(probe.score(part))) or 1.0 for probe, part in zip(members, parts, strict=True)]
        shares = [1.0 / (self.taps * each) for each in spread]
        return LinearProbe(
            np.concatenate([share * probe.direction for share, probe in zip(shares, members, strict=True)]),
            np.concatenate([probe.mean for probe in members]),
            np.concatenate([probe.scale for probe in members]),
            float(sum(share * probe.bias for share, probe in zip(shares, members, strict=True))),
        )


def ensemble_tensors(probe: LinearProbe, taps: int) -> dict[str, npt.NDArray[np.float32]]:
    """A probe on several taps side by side, as an artifact of kind ``ensemble`` holds it."""
    stacked = {name: tensor.reshape(taps, -1) for name, tensor in probe.tensors().items() if name != "bias"}
    # What is added is added once, so it stands at the first tap; the shares are in the directions.
    bias = np.zeros(taps, dtype=np.float32)
    bias[0] = probe.bias
    return {**stacked, "bias": bias, "share": np.ones(taps, dtype=np.float32)}
