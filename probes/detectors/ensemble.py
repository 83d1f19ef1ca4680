"""A layer ensemble: one direction at each of several taps, their scores weighed and added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from probes.artifact import Artifact
from probes.detectors.base import Detector, Directions, Float64, Layout, standardised
from probes.taps import Tap


class Ensemble(Detector):
    """score = sum over taps l of share[l] * (direction[l] . (s[l] - mean[l]) / scale[l] + bias[l]).

    The artifact holds ``direction``, ``mean`` and ``scale`` (taps, d_model), ``bias`` and ``share`` (taps,), in the
    order of the card's taps. Less fragile than one layer (arXiv 2604.13386).
    """

    kind = "ensemble"
    layout = Layout({"direction": "bias"}, by_tap=True)

    def __init__(self, name: str, parts: Sequence[Directions]) -> None:
        super().__init__(name)
        self._parts = tuple(parts)

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """See ``Detector.from_artifact``."""
        taps, width = artifact.taps, artifact.card.model.d_model
        direction, mean = (artifact.matrix(key, len(taps), width) for key in ("direction", "mean"))
        scale = artifact.positive("scale", len(taps), width)
        bias, share = (artifact.vector(key, len(taps)) for key in ("bias", "share"))
        return cls(
            name,
            [
                standardised(tap, share[i] * direction[i][None], share[[i]] * bias[[i]], mean=mean[i], scale=scale[i])
                for i, tap in enumerate(taps)
            ],
        )

    def directions(self) -> Sequence[Directions]:
        """One direction at each tap, its share folded in."""
        return self._parts

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """The sum of the readouts."""
        found: Float64 = np.sum([readouts[part.tap][:, 0] for part in self._parts], axis=0)
        return found
