"""Detectors: what is read and what the numbers mean. One file per kind, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from probes.artifact import Artifact, ArtifactError
from probes.detectors.base import Detector, Directions, Scorer
from probes.discovery import discover
from probes.errors import did_you_mean

__all__ = ["Detector", "Directions", "Scorer", "detector_kinds", "load_detector"]


def detector_kinds() -> Mapping[str, type[Detector]]:
    """Every detector class by its kind."""
    return discover(sys.modules[__name__], Detector)


def load_detector(artifact: Artifact, *, name: str | None = None) -> Detector:
    """The detector that an artifact holds.

    Args:
        artifact: tensors and card.
        name: what to call it; the card's name if None.
    Raises:
        ArtifactError: the card's kind is unknown, or a tensor does not fit the kind.
    """
    kinds = detector_kinds()
    kind = artifact.card.kind
    if kind not in kinds:
        raise ArtifactError(
            f"{artifact.path}: the card's kind is {kind!r}, which this version does not know. "
            f"{did_you_mean(kind, kinds)} Install a newer telltale or train the detector again."
        )
    return kinds[kind].from_artifact(artifact, name=name or artifact.card.name)
