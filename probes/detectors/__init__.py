"""Detectors: what is read and what the numbers mean. One file per kind, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from probes.aggregate import Aggregator
from probes.artifact import Artifact, ArtifactError
from probes.detectors.base import Detector, Directions, Layout, Scorer
from probes.discovery import discover
from probes.errors import did_you_mean

__all__ = ["Detector", "Directions", "Layout", "Scorer", "detector_kinds", "load_detector", "unfit_aggregate"]


def detector_kinds() -> Mapping[str, type[Detector]]:
    """Every detector class by its kind."""
    return discover(sys.modules[__name__], Detector)


def load_detector(artifact: Artifact, *, name: str | None = None) -> Detector:
    """The detector that an artifact holds.

    Args:
        artifact: tensors and card.
        name: what to call it; the card's name if None.
    Raises:
        ArtifactError: the card's kind is unknown, or a tensor, calibration or canary does not fit the kind.
    """
    kinds = detector_kinds()
    kind = artifact.card.kind
    if kind not in kinds:
        raise ArtifactError(
            f"{artifact.path}: the card's kind is {kind!r}, which this version does not know. "
            f"{did_you_mean(kind, kinds)} Install a newer telltale or train the detector again."
        )
    detector = kinds[kind].from_artifact(artifact, name=name or artifact.card.name)
    _require_card(artifact, detector)
    return detector


def _require_card(artifact: Artifact, detector: Detector) -> None:
    """The aggregates and the canary on the card take what the detector gives."""
    card = artifact.card
    for calibration in card.calibrations:
        if problem := unfit_aggregate(detector, calibration.aggregate):
            raise ArtifactError(
                f"{artifact.path}: the calibration at {calibration.stage.value}: {problem} Calibrate it again."
            )
    if card.canary is not None:
        expected = (len(card.canary.tokens) - card.skip_first) * detector.channels
        if len(card.canary.scores) != expected:
            raise ArtifactError(
                f"{artifact.path}: the canary has {len(card.canary.scores)} scores; {expected} are due, "
                f"{detector.channels} a token. Write it again (telltale canary)."
            )


def unfit_aggregate(detector: Detector, aggregate: Aggregator) -> str:
    """Why an aggregate cannot take what a detector gives of a row; empty if it can."""
    wanted = detector.aggregate_kind
    if aggregate.channels == detector.channels and wanted in (None, aggregate.kind):
        return ""
    if wanted is None:
        return f"{aggregate} does not take the one number a token that a detector of the kind {detector.kind!r} gives."
    return (
        f"{aggregate} does not go with a detector of the kind {detector.kind!r}, which gives {detector.channels} "
        f"number(s) a token for the aggregate {wanted!r} alone."
    )
