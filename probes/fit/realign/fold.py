"""A linear map folded into a detector's tensors: what is read changes, the arithmetic on it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact
from probes.card import Card
from probes.detectors import load_detector
from probes.fit.realign.moments import Float64
from probes.fit.realign.ridge import LinearMap, RealignError
from probes.taps import Tap

__all__ = ["fold", "require_foldable"]

Tensors = dict[str, npt.NDArray[np.generic]]

_SAME = 1e-6
"""Largest difference to the exact fold, as a share of the largest weight."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a kind keeps its directions, which are in units of ``(s - mean) / scale``.

    Attributes:
        directions: tensor -> the tensor with its constants; None where a constant changes nothing that is judged.
        has_mean: whether there is a ``mean`` to be subtracted.
        by_tap: whether the first axis of each tensor counts taps; else all directions are read at one tap.
    """

    directions: Mapping[str, str | None]
    has_mean: bool = True
    by_tap: bool = False


_LAYOUTS: Mapping[str, _Layout] = MappingProxyType(
    {
        # A softmax over tokens is the same for queries that are all larger by the same amount.
        "attention": _Layout({"query": None, "value": "bias"}),
        # Only differences of its scores are judged.
        "drift": _Layout({"direction": None}, has_mean=False),
        "ensemble": _Layout({"direction": "bias"}, by_tap=True),
        "linear": _Layout({"direction": "bias"}),
        "mlp": _Layout({"hidden": "hidden_bias"}),
        "multimax": _Layout({"value": "bias"}),
    }
)


def require_foldable(artifact: Artifact) -> None:
    """Refuse kinds that no linear map repairs.

    Raises:
        RealignError: says why.
    """
    kind = artifact.card.kind
    if kind in _LAYOUTS:
        return
    if load_detector(artifact).reads_norm:
        reason = "reads the norm of the stream, and a linear map to the old stream does not keep norms"
    else:
        reason = f"is not one whose tensors can be rewritten (those are {', '.join(_LAYOUTS)})"
    raise RealignError(f"{artifact.path}: a detector of the kind {kind!r} {reason}. Train it on the new build.")


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
    require_foldable(artifact)
    layout = _LAYOUTS[artifact.card.kind]
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


def _rewritten(artifact: Artifact, maps: Sequence[LinearMap], layout: _Layout, name: str) -> tuple[Float64, Float64]:
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


def _of_tap(artifact: Artifact, layout: _Layout, key: str, number: int) -> Float64:
    if key == "mean" and not layout.has_mean:
        return np.zeros(artifact.card.model.d_model)
    stored = artifact.tensors[key].astype(np.float64)
    return np.asarray(stored[number] if layout.by_tap else stored)


def _stacked(layout: _Layout, parts: Sequence[Float64]) -> Float64:
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
