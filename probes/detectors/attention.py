"""An attention probe: for each head one direction that says where to look, and one that says what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from probes.artifact import Artifact
from probes.detectors.base import Detector, Directions, Float64, Layout, standardised
from probes.taps import Tap


class Attention(Detector):
    """A row gives q[h] = query[h] . z and v[h] = value[h] . z + bias[h] with z = (s - mean) / scale.

    The aggregate of the same name makes the statistic of them. The artifact holds ``query`` and ``value``
    (heads, d_model), ``mean`` and ``scale`` (d_model,), ``bias`` (heads,).
    """

    kind = "attention"
    aggregate_kind = "attention"
    # A softmax over tokens is the same for queries that are all larger by the same amount.
    layout = Layout({"query": None, "value": "bias"})

    def __init__(self, name: str, directions: Directions) -> None:
        super().__init__(name)
        self._directions = directions

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """See ``Detector.from_artifact``."""
        width = artifact.card.model.d_model
        query = artifact.matrix("query", None, width)
        heads = len(query)
        value, bias = artifact.matrix("value", heads, width), artifact.vector("bias", heads)
        mean, scale = artifact.vector("mean", width), artifact.positive("scale", width)
        stacked = np.concatenate([query, value])
        biases = np.concatenate([np.zeros(heads), bias])
        return cls(name, standardised(artifact.only_tap, stacked, biases, mean=mean, scale=scale))

    @property
    def channels(self) -> int:
        """A query and a value for each head."""
        return len(self._directions.bias)

    def directions(self) -> Sequence[Directions]:
        """The queries of all heads, then the values."""
        return (self._directions,)

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """What was read, as it stands: (n, 2 * heads)."""
        return readouts[self._directions.tap]
