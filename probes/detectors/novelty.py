"""How unlike ordinary text an activation is: a squared Mahalanobis distance by principal components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from probes.artifact import Artifact, ArtifactError
from probes.detectors.base import Detector, Directions, Float64
from probes.taps import Tap

_ORTHONORMAL = 1e-3


class Novelty(Detector):
    """score = (sum over i of (p[i] . d)^2 / variance[i] + rest / rest_variance) / d_model with d = s - mean.

    ``rest`` is what of |d|^2 lies outside of the k components p: the distance of a probabilistic PCA (Tipping & Bishop
    1999), divided by its expected value, so that ordinary text scores about 1. The artifact holds ``mean`` (d_model,),
    ``components`` (k, d_model) of length 1 and perpendicular, ``variance`` (k,) and ``rest_variance`` (1,).

    It finds what is unusual, not what is harmful: another language, code, noise. It says where other detectors are out
    of their depth, so nothing may be blocked by it alone.
    """

    kind = "novelty"
    reads_norm = True
    may_block_alone = False

    def __init__(
        self, name: str, tap: Tap, *, mean: Float64, components: Float64, variance: Float64, rest_variance: float
    ) -> None:
        super().__init__(name)
        self._tap = tap
        self._mean = mean
        self._components = components
        self._variance = variance
        self._rest_variance = rest_variance

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """See ``Detector.from_artifact``."""
        width = artifact.card.model.d_model
        components = artifact.matrix("components", None, width)
        count = len(components)
        if count >= width or np.abs(components @ components.T - np.eye(count)).max() > _ORTHONORMAL:
            raise ArtifactError(
                f"{artifact.path}: 'components' holds {count} rows; they must be fewer than {width}, of length 1 and "
                "perpendicular to each other. Fit it again (telltale train)."
            )
        return cls(
            name,
            artifact.only_tap,
            mean=artifact.vector("mean", width),
            components=components,
            variance=artifact.positive("variance", count),
            rest_variance=float(artifact.positive("rest_variance", 1)[0]),
        )

    def directions(self) -> Sequence[Directions]:
        """The components, and the mean: what of |s - mean|^2 the norm of s does not say."""
        weight = np.column_stack([self._components.T, self._mean])
        bias = np.append(-self._components @ self._mean, 0.0)
        return (Directions(self._tap, weight, bias),)

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """1 on average over the text that it was fitted on."""
        found = readouts[self._tap]
        inside = np.square(found[:, :-2])
        along_mean, squared_norm = found[:, -2], found[:, -1]
        whole = squared_norm - 2.0 * along_mean + self._mean @ self._mean
        rest = np.maximum(whole - inside.sum(axis=1), 0.0)
        distance: Float64 = inside @ (1.0 / self._variance) + rest / self._rest_variance
        return distance / len(self._mean)
