"""Task drift: how far the activation moves along a direction while the model reads what nobody vouches for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from probes.artifact import Artifact
from probes.detectors.base import Detector, Directions, Float64, Layout
from probes.taps import Tap


class Drift(Detector):
    """score = direction . s / scale. Only differences of it mean something: the aggregate ``delta`` takes them.

    A rule on it names the ``segments`` that are not trusted, e.g. ``[tool]``; the statistic compares their rows with
    the last row before them (Abdelnabi et al., arXiv 2406.00799). The artifact holds ``direction`` and ``scale``
    (d_model,).
    """

    kind = "drift"
    aggregate_kind = "delta"
    layout = Layout({"direction": None}, has_mean=False)

    def __init__(self, name: str, tap: Tap, weight: Float64) -> None:
        super().__init__(name)
        self._tap = tap
        self._weight = weight

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """See ``Detector.from_artifact``."""
        width = artifact.card.model.d_model
        return cls(name, artifact.only_tap, artifact.vector("direction", width) / artifact.positive("scale", width))

    def directions(self) -> Sequence[Directions]:
        """One direction."""
        return (Directions(self._tap, self._weight[:, None], np.zeros(1)),)

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """The readout, as it stands."""
        return readouts[self._tap][:, 0]
