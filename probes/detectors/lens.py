"""A logit lens on a few tokens: how much a layer already speaks for some next tokens, against others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from scipy.special import logsumexp

from probes.artifact import Artifact
from probes.detectors.base import Detector, Directions, Float64
from probes.taps import Tap


class Lens(Detector):
    """score = log(sum over tokens of exp(logit)) - log(sum over contrast of exp(logit)), logit = u . s / rms(s).

    Log-odds that the next token is one of the first set rather than of the second, had the model ended after this
    layer. rms(s) = sqrt(|s|^2 / d_model + epsilon). The artifact holds ``tokens`` and ``contrast`` (any, d_model), rows
    of the unembedding with the final norm's weight folded in, and ``epsilon`` (1,). Exact after the last layer of a
    model whose final norm is an RMSNorm; unreliable in early ones.
    """

    kind = "lens"
    reads_norm = True

    def __init__(self, name: str, tap: Tap, *, tokens: Float64, contrast: Float64, epsilon: float) -> None:
        super().__init__(name)
        self._tap = tap
        self._rows = np.concatenate([tokens, contrast])
        self._count = len(tokens)
        self._epsilon = epsilon

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """See ``Detector.from_artifact``."""
        width = artifact.card.model.d_model
        tokens, contrast = (artifact.matrix(key, None, width) for key in ("tokens", "contrast"))
        epsilon = float(artifact.positive("epsilon", 1)[0])
        return cls(name, artifact.only_tap, tokens=tokens, contrast=contrast, epsilon=epsilon)

    def directions(self) -> Sequence[Directions]:
        """The rows of both sets."""
        return (Directions(self._tap, np.ascontiguousarray(self._rows.T), np.zeros(len(self._rows))),)

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """Log-odds of the first set against the second."""
        found = readouts[self._tap]
        logits = found[:, :-1] / np.sqrt(found[:, -1:] / self._rows.shape[1] + self._epsilon)
        odds: Float64 = logsumexp(logits[:, : self._count], axis=1) - logsumexp(logits[:, self._count :], axis=1)
        return odds
