"""A MultiMax probe: several directions, of each of which the largest value over all tokens counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from probes.artifact import Artifact
from probes.detectors.base import Detector, Directions, Float64, Layout, standardised
from probes.taps import Tap


class MultiMax(Detector):
    """A row gives v[h] = value[h] . (s - mean) / scale + bias[h]; the aggregate of the same name makes the statistic.

    The artifact holds ``value`` (heads, d_model), ``mean`` and ``scale`` (d_model,), ``bias`` (heads,).
    """

    kind = "multimax"
    aggregate_kind = "multimax"
    layout = Layout({"value": "bias"})

    def __init__(self, name: str, directions: Directions) -> None:
        super().__init__(name)
        self._directions = directions

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """See ``Detector.from_artifact``."""
        width = artifact.card.model.d_model
        value = artifact.matrix("value", None, width)
        bias = artifact.vector("bias", len(value))
        mean, scale = artifact.vector("mean", width), artifact.positive("scale", width)
        return cls(name, standardised(artifact.only_tap, value, bias, mean=mean, scale=scale))

    @property
    def channels(self) -> int:
        """A value for each head."""
        return len(self._directions.bias)

    def directions(self) -> Sequence[Directions]:
        """The values of all heads."""
        return (self._directions,)

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """What was read, as it stands: (n, heads)."""
        return readouts[self._directions.tap]
