"""Latents of a sparse autoencoder, each at the price of a linear probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from probes.artifact import Artifact, ArtifactError
from probes.detectors.base import Detector, Directions, Float64, Scorer
from probes.sae.combine import Combine, LatentParameters
from probes.sae.normalisation import Normalisation, row_scale
from probes.taps import Tap


class SaeLatent(Detector):
    """score = what ``combine`` makes of the codes ``f = x [x > threshold]``, ``x = encoder . norm(s) + encoder_bias``.

    The codes are those of the full encode within 1e-5 of their scale, with the same active set outside that distance
    from the threshold. The artifact holds ``encoder`` (m, d_model), ``encoder_bias`` and ``threshold`` (m,), one row
    for each latent; for ``combine: weighted`` also ``weight`` (m,) and ``intercept`` (1,). The card's parameters are
    ``LatentParameters``. A normalisation of rows is undone by the squared norm that is read anyway; the one by layer
    norm costs one direction more, for the mean.
    """

    kind = "sae_latent"
    reads_norm = True

    def __init__(
        self,
        name: str,
        tap: Tap,
        *,
        encoder: Float64,
        encoder_bias: Float64,
        threshold: Float64,
        combine: Combine = Combine.SUM,
        normalisation: Normalisation = Normalisation.NONE,
        weight: Float64 | None = None,
        intercept: float = 0.0,
    ) -> None:
        super().__init__(name)
        self.tap = tap
        self.combine = combine
        self.normalisation = normalisation
        self._encoder = encoder
        self._bias = encoder_bias
        self.threshold = threshold
        self.weight: Float64 = np.ones(len(encoder)) if weight is None else weight
        self.intercept = intercept

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """See ``Detector.from_artifact``."""
        try:
            told = LatentParameters.model_validate(artifact.card.parameters)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "parameters"
            raise ArtifactError(
                f"{artifact.path}: the card's parameters: {where!r}: {first['msg']}. Make it again (telltale sae "
                "detector)."
            ) from error
        encoder = artifact.matrix("encoder", None, artifact.card.model.d_model)
        count = len(encoder)
        threshold = artifact.vector("threshold", count)
        if np.any(threshold < 0):
            raise ArtifactError(f"{artifact.path}: 'threshold' holds negative values; a latent has 0 or more.")
        if told.combine is Combine.SINGLE and count > 1:
            raise ArtifactError(f"{artifact.path}: combine is 'single', and there are {count} latents.")
        weighted = told.combine is Combine.WEIGHTED
        return cls(
            name,
            artifact.only_tap,
            encoder=encoder,
            encoder_bias=artifact.vector("encoder_bias", count),
            threshold=threshold,
            combine=told.combine,
            normalisation=told.normalisation,
            weight=artifact.vector("weight", count) if weighted else None,
            intercept=float(artifact.vector("intercept", 1)[0]) if weighted else 0.0,
        )

    def directions(self) -> Sequence[Directions]:
        """One row for each latent; a last one for the mean of the row, where that is divided out."""
        weight = np.ascontiguousarray(self._encoder.T)
        if self.normalisation is Normalisation.NONE:
            return (Directions(self.tap, weight, self._bias),)
        if self.normalisation is Normalisation.LAYER:
            width = weight.shape[0]
            weight = np.column_stack([weight, np.full(width, 1.0 / width)])
        return (Directions(self.tap, weight, np.zeros(weight.shape[1])),)

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """In the units of the codes."""
        found = readouts[self.tap]
        count = len(self._encoder)
        before = found[:, :count]
        if self.normalisation is not Normalisation.NONE:
            scale = row_scale(self.normalisation, found[:, -1], found[:, -2], self._encoder.shape[1])
            before = before / scale[:, None] + self._bias
        codes = _active(before, self.threshold)
        if self.combine is Combine.MAX:
            largest: Float64 = codes.max(axis=1)
            return largest
        total: Float64 = codes @ self.weight + self.intercept
        return total

    def readout_limit(self, threshold: float) -> float | None:
        """One latent decides by itself; a silent one's 0 lies above all that is below 0."""
        alone = len(self.threshold) == 1 and self.combine is not Combine.WEIGHTED
        if not alone or self.normalisation is not Normalisation.NONE:
            return None
        return max(threshold, float(self.threshold[0])) if threshold >= 0 else -float("inf")

    @classmethod
    def scorer(cls, detectors: Sequence[Self], columns: Sequence[Mapping[Tap, npt.NDArray[np.intp]]]) -> Scorer:
        """All latents of all detectors at once, where none of them normalises rows."""
        if any(detector.normalisation is not Normalisation.NONE for detector in detectors):
            return super().scorer(detectors, columns)
        counts = [len(detector.threshold) for detector in detectors]
        parts = [places[d.tap][:count] for d, places, count in zip(detectors, columns, counts, strict=True)]
        index = np.concatenate(parts)
        threshold = np.concatenate([detector.threshold for detector in detectors]).astype(np.float32)
        weight = np.concatenate([detector.weight for detector in detectors])
        intercept = np.array([detector.intercept for detector in detectors])
        starts = np.cumsum([0, *counts[:-1]])
        take_largest = np.array([detector.combine is Combine.MAX for detector in detectors])
        weighted = any(detector.combine is Combine.WEIGHTED for detector in detectors)

        def score(readouts: npt.NDArray[np.floating]) -> Float64:
            codes: Float64 = _active(readouts.take(index, axis=1), threshold).astype(np.float64)
            if weighted:
                codes *= weight
            if len(starts) == len(index):
                return codes + intercept if weighted else codes
            if take_largest.all():
                largest: Float64 = np.maximum.reduceat(codes, starts, axis=1)
                return largest
            total: Float64 = np.add.reduceat(codes, starts, axis=1) + intercept
            if take_largest.any():
                np.copyto(total, np.maximum.reduceat(codes, starts, axis=1), where=take_largest)
            return total

        return score


F = TypeVar("F", np.float32, np.float64)


def _active(before: npt.NDArray[F], threshold: npt.NDArray[F]) -> npt.NDArray[F]:
    """Codes of pre-activations; by a product, as what is not finite must stay so: it is a gap, not a silent latent."""
    codes: npt.NDArray[F] = before * (before > threshold)
    return codes
