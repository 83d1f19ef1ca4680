"""Probes of a few latents, and of the raw activations: the same fit, so that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from probes.fit.evaluation.measure import auroc
from probes.fit.fitters.logistic import Logistic
from probes.fit.training.linear_probe import LinearProbe

__all__ = ["LatentProbe", "fit_latents", "fit_raw", "largest_differences"]

_PENALTIES = (0.001, 0.01, 0.1, 1.0)
_FOLDS = 4

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LatentProbe:
    """A weighted sum of some latents' codes.

    Attributes:
        latents: (k,) numbers.
        probe: on their codes, in this order.
    """

    latents: Int64
    probe: LinearProbe

    def score(self, codes: Float32) -> Float64:
        """(requests,) of (requests, width) codes."""
        return self.probe.score(codes[:, self.latents])


def largest_differences(codes: Float32, labels: Int64) -> Int64:
    """All latents, that first whose mean differs most between the labels, in units of its spread.

    Args:
        codes: (requests, width).
        labels: (requests,), 0 or 1, both present.
    """
    difference = codes[labels == 1].mean(axis=0, dtype=np.float64) - codes[labels == 0].mean(axis=0, dtype=np.float64)
    spread = codes.std(axis=0, dtype=np.float64)
    scaled = np.divide(np.abs(difference), spread, out=np.zeros_like(spread), where=spread > 0)
    return np.argsort(-scaled, kind="stable").astype(np.int64)


def fit_latents(codes: Float32, labels: Int64, groups: Sequence[str], count: int) -> LatentProbe:
    """The ``count`` latents with the largest difference, and logistic regression on them.

    This is the k-sparse probe of Gurnee et al. (2023, arXiv:2305.01610), with the selection by mean difference that
    Kantamneni et al. (2025, arXiv:2502.16681) found as good as others.

    Args:
        codes: (requests, width) means over each request's tokens.
        labels: (requests,), 0 or 1, both present.
        groups: of each request; the penalty is chosen in folds of whole groups.
        count: k.
    """
    latents = largest_differences(codes, labels)[:count]
    return LatentProbe(latents, fit_raw(codes[:, latents], labels, groups))


def fit_raw(features: Float32, labels: Int64, groups: Sequence[str]) -> LinearProbe:
    """Logistic regression on all features; the penalty is chosen in folds of whole groups, by their mean AUROC.

    Args:
        features: (requests, features).
        labels: (requests,), 0 or 1, both present.
        groups: of each request.
    """
    folds = _folds(labels, groups)
    quality = [
        np.mean([auroc(_fit(features[a], labels[a], penalty).score(features[b]), labels[b]) for a, b in folds] or [0])
        for penalty in _PENALTIES
    ]
    return _fit(features, labels, _PENALTIES[int(np.argmax(quality))] if folds else 0.1)


def _fit(features: Float32, labels: Int64, penalty: float) -> LinearProbe:
    return Logistic(inverse_penalty=penalty).fit(features, labels)


def _folds(labels: Int64, groups: Sequence[str]) -> list[tuple[Int64, Int64]]:
    """Those in which both labels stand on both sides; none where there are too few groups."""
    of_label = [len({group for group, label in zip(groups, labels, strict=True) if label == each}) for each in (0, 1)]
    count = min(_FOLDS, *of_label)
    if count < 2:  # noqa: PLR2004 - a fold is left out and another is fitted on
        return []
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    return [
        (train, test)
        for train, test in splitter.split(labels, labels, groups=list(groups))
        if len(set(labels[train])) == len(set(labels[test])) == 2  # noqa: PLR2004 - labels
    ]
