"""A linear probe: one direction at one tap (logistic regression, difference of means, LDA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact
from probes.detectors.base import Detector, Directions, Float64, Layout, Scorer, standardised
from probes.taps import Tap


class Linear(Detector):
    """score = direction . (s - mean) / scale + bias, in logits for a logistic-regression probe.

    The artifact holds ``direction``, ``mean``, ``scale`` (d_model,) and ``bias`` (1,), any float dtype.
    """

    kind = "linear"
    score_is_readout = True
    layout = Layout({"direction": "bias"})

    def __init__(self, name: str, tap: Tap, weight: Float64, bias: float) -> None:
        super().__init__(name)
        self.tap = tap
        self.weight = weight
        self.bias = bias

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """See ``Detector.from_artifact``."""
        width = artifact.card.model.d_model
        direction, mean = artifact.vector("direction", width), artifact.vector("mean", width)
        scale, bias = artifact.positive("scale", width), artifact.vector("bias", 1)
        tap = artifact.only_tap
        folded = standardised(tap, direction[None], bias, mean=mean, scale=scale)
        return cls(name, tap, folded.weight[:, 0], float(folded.bias[0]))

    def directions(self) -> Sequence[Directions]:
        """One direction."""
        return (Directions(self.tap, self.weight[:, None], np.array([self.bias])),)

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """The readout is the score."""
        return readouts[self.tap][:, 0]

    @classmethod
    def scorer(cls, detectors: Sequence[Self], columns: Sequence[Mapping[Tap, npt.NDArray[np.intp]]]) -> Scorer:
        """Pick the columns: nothing is left to compute."""
        index = np.array([int(places[d.tap][0]) for d, places in zip(detectors, columns, strict=True)], dtype=np.intp)

        def pick(readouts: npt.NDArray[np.floating]) -> Float64:
            # Column by column: so the monitor reads them, and so they are picked faster than row by row.
            return readouts.T[index].astype(np.float64).T

        return pick
