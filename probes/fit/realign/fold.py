"""A linear map folded into a detector's tensors: what is read changes, the arithmetic on it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact
from probes.card import Card
from probes.detectors import Layout, load_detector
from probes.fit.realign.moments import Float64
from probes.fit.realign.ridge import LinearMap, RealignError
from probes.taps import Tap

__all__ = ["fold", "require_foldable"]

Tensors = dict[str, npt.NDArray[np.generic]]

_SAME = 1e-6
"""Largest difference to the exact fold, as a share of the largest weight."""


def require_foldable(artifact: Artifact) -> Layout:
    """Where the detector's tensors hold its directions; refuses kinds that no linear map repairs.

    Raises:
        RealignError: says why.
    """
    detector = load_detector(artifact)
    if detector.layout is not None and not detector.reads_norm:
        return detector.layout
    if detector.reads_norm:
        reason = "reads the norm of the stream, and a linear map to the old stream does not keep norms"
    else:
        reason = "does not say which of its tensors hold directions (Detector.layout)"
    raise RealignError(
        f"{artifact.path}: a detector of the kind {detector.kind!r} {reason}. Train it on the new build."
    )


def fold(artifact: Artifact, maps: Mapping[Tap, LinearMap], card: Card) -> Artifact:
    """The detector that reads the new build as the old one was read.

    With old = new @ M + c, a readout old @ W + b is new @ (M W) + (b + c W): exact, in float64. Directions are kept in
    units of the new activations' standard deviations.

    Args:
        artifact: of the old build.
        maps: for each of its taps.
        card: of the new artifact.
    Returns: in memory, its tensors in float64.

    Raises:
        RealignError: see ``require_foldable``; or this version of the kind keeps its directions elsewhere.
    """
    layout = require_foldable(artifact)
    _require_tensors(artifact, layout)
    chosen = [maps[tap] for tap in artifact.taps]
    tensors: Tensors = dict(artifact.tensors)
    for name, constants in layout.directions.items():
        tensors[name], added = _rewritten(artifact, chosen, layout, name)
        if constants is not None:
            tensors[constants] = artifact.tensors[constants].astype(np.float64) + added
    tensors["scale"] = _stacked(layout, [found.scale for found in chosen])
    if layout.has_mean:
        tensors["mean"] = _stacked(layout, [found.mean for found in chosen])
    made = Artifact(artifact.path, card, tensors)
    _require_exact(artifact, made, maps)
    return made


def _require_tensors(artifact: Artifact, layout: Layout) -> None:
    """What the kind names is there: a mistake in a kind of another distribution is told as one."""
    constants = (name for name in layout.directions.values() if name is not None)
    named = {*layout.directions, *constants, "scale", *(["mean"] if layout.has_mean else [])}
    if missing := sorted(named - set(artifact.tensors)):
        raise RealignError(
            f"{artifact.path}: the layout of the kind {artifact.card.kind!r} names {', '.join(missing)}, which the "
            f"artifact does not hold (it holds {', '.join(sorted(artifact.tensors))}). Correct the kind's 'layout'."
        )


def _rewritten(artifact: Artifact, maps: Sequence[LinearMap], layout: Layout, name: str) -> tuple[Float64, Float64]:
    """A tensor of directions, and what is to be added to the constants of its rows."""
    stored = artifact.tensors[name].astype(np.float64)
    rows = stored.reshape(-1, stored.shape[-1])
    parts, added = [], []
    for number, found in enumerate(maps):
        own = rows[[number]] if layout.by_tap else rows
        mean, scale = (_of_tap(artifact, layout, key, number) for key in ("mean", "scale"))
        weight = (own / scale).T
        mapped = found.matrix @ weight
        parts.append((mapped * found.scale[:, None]).T)
        added.append((found.offset - mean) @ weight + found.mean @ mapped)
    return np.concatenate(parts).reshape(stored.shape), np.concatenate(added)


def _of_tap(artifact: Artifact, layout: Layout, key: str, number: int) -> Float64:
    if key == "mean" and not layout.has_mean:
        return np.zeros(artifact.card.model.d_model)
    stored = artifact.tensors[key].astype(np.float64)
    return np.asarray(stored[number] if layout.by_tap else stored)


def _stacked(layout: Layout, parts: Sequence[Float64]) -> Float64:
    return np.stack(parts) if layout.by_tap else parts[0]


def _require_exact(old: Artifact, new: Artifact, maps: Mapping[Tap, LinearMap]) -> None:
    """What the detector itself says that it reads is the map applied to what it read."""
    for was, found in zip(load_detector(old).directions(), load_detector(new).directions(), strict=True):
        expected = maps[was.tap].matrix @ was.weight
        if not np.allclose(found.weight, expected, rtol=0.0, atol=_SAME * np.abs(expected).max()):
            raise RealignError(
                f"{old.path}: the tensors of kind {old.card.kind!r} are not laid out as this repair expects. "
                "Train it on the new build."
            )
