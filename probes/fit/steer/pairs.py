"""Contrast pairs: two texts that differ in one respect, and the direction between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from probes.errors import TelltaleError
from probes.fit.rows.example import Example
from probes.fit.rows.json_lines import read_json_lines
from probes.steering.base import Float64

__all__ = ["Pair", "PairError", "Quality", "VectorMethod", "direction_of", "pairs_digest", "quality_of", "read_pairs"]

_MIN_PAIRS = 4


class PairError(TelltaleError, ValueError):
    """Contrast pairs cannot be read, or have no direction."""


class VectorMethod(StrEnum):
    """How a direction is found in the differences of pairs."""

    MEAN = "mean"
    """Their mean: CAA (Rimsky et al. 2023, arXiv:2312.06681)."""
    PCA = "pca"
    """Their first principal component, uncentred, pointing as the mean does: RepE (Zou et al. 2023,
    arXiv:2310.01405)."""


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    positive: str = Field(min_length=1)
    negative: str = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts; the direction points from the negative to the positive one."""

    positive: Example
    negative: Example


@dataclass(frozen=True, slots=True)
class Quality:
    """Whether the pairs agree on a direction; to be looked at before a policy relies on it.

    Attributes:
        pairs: how many.
        agreement: mean cosine between a pair's difference and the direction of the other pairs.
        reversed_share: share of pairs whose difference points the other way.
    """

    pairs: int
    agreement: float
    reversed_share: float

    def as_dict(self) -> dict[str, Any]:
        """For a card."""
        return {
            "pairs": self.pairs,
            "agreement": round(self.agreement, 4),
            "reversed_share": round(self.reversed_share, 4),
        }


def read_pairs(path: Path) -> list[Pair]:
    """Read JSON lines: ``{"positive": "...", "negative": "..."}``.

    Raises:
        PairError: the file cannot be read, a line is not of that form, or there are too few.
    """
    form = '{"positive": "...", "negative": "..."} with two texts'
    pairs = []
    for item in read_json_lines(path, TypeAdapter(_Line), form=form, error=PairError):
        made = [
            Example(text=value, label=label, source=str(path), group=str(item.number))
            for label, value in ((1, item.line.positive), (0, item.line.negative))
        ]
        pairs.append(Pair(*made))
    if len(pairs) < _MIN_PAIRS:
        raise PairError(f"{path}: {len(pairs)} pairs; at least {_MIN_PAIRS} are needed, fifty or more are usual.")
    return pairs


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 over all pairs, in their order."""
    content = json.dumps([[pair.positive.text, pair.negative.text] for pair in pairs])
    return hashlib.sha256(content.encode()).hexdigest()


def direction_of(differences: Float64, method: VectorMethod) -> Float64:
    """The direction of length 1 in the differences of pairs.

    Args:
        differences: (pairs, d_model), positive minus negative.
        method: how it is found.
    Raises:
        PairError: the differences cancel each other.
    """
    mean: Float64 = differences.mean(axis=0)
    found = mean
    if method is VectorMethod.PCA:
        _, _, components = np.linalg.svd(differences, full_matrices=False)
        found = components[0] * (1.0 if components[0] @ mean >= 0 else -1.0)
    length = float(np.linalg.norm(found))
    if not np.isfinite(length) or length <= 1e-6 * float(np.linalg.norm(differences, axis=1).mean()):
        raise PairError("the differences of the pairs cancel each other: there is no direction. Look at the pairs.")
    return np.asarray(found / length)


def quality_of(differences: Float64, method: VectorMethod) -> Quality:
    """How far the pairs agree: each is compared with the direction of the others, so that it cannot agree with itself.

    Args:
        differences: (pairs, d_model).
        method: how directions are found; PCA is judged by the direction of all pairs, which one pair hardly moves.
    """
    lengths = np.maximum(np.linalg.norm(differences, axis=1), 1e-30)
    if method is VectorMethod.MEAN:
        others = differences.sum(axis=0) - differences
        others /= np.maximum(np.linalg.norm(others, axis=1, keepdims=True), 1e-30)
        along = (differences * others).sum(axis=1)
    else:
        along = differences @ direction_of(differences, method)
    return Quality(len(differences), float((along / lengths).mean()), float((along < 0).mean()))
