"""A probe with one hidden layer: for concepts that no single direction separates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from probes.artifact import Artifact
from probes.detectors.base import Detector, Directions, Float64, Layout, standardised
from probes.taps import Tap


class Mlp(Detector):
    """score = out . max(0, hidden @ (s - mean) / scale + hidden_bias) + out_bias, in logits.

    The artifact holds ``hidden`` (units, d_model), ``hidden_bias`` and ``out`` (units,), ``out_bias`` (1,), ``mean``
    and ``scale`` (d_model,). It may compute what the model does not know, and has no direction to steer along.
    """

    kind = "mlp"
    layout = Layout({"hidden": "hidden_bias"})

    def __init__(self, name: str, hidden: Directions, out: Float64, out_bias: float) -> None:
        super().__init__(name)
        self._hidden = hidden
        self._out = out
        self._out_bias = out_bias

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """See ``Detector.from_artifact``."""
        width = artifact.card.model.d_model
        hidden = artifact.matrix("hidden", None, width)
        bias, out = (artifact.vector(key, len(hidden)) for key in ("hidden_bias", "out"))
        mean, scale = artifact.vector("mean", width), artifact.positive("scale", width)
        directions = standardised(artifact.only_tap, hidden, bias, mean=mean, scale=scale)
        return cls(name, directions, out, float(artifact.vector("out_bias", 1)[0]))

    def directions(self) -> Sequence[Directions]:
        """The hidden units."""
        return (self._hidden,)

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """The second layer."""
        found: Float64 = np.maximum(readouts[self._hidden.tap], 0.0) @ self._out + self._out_bias
        return found
