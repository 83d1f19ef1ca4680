"""A linear map from the activations of a new build to those of an old one: ridge regression in closed form.

Stitching of representations by a linear map: Bansal, Nakkiran and Barak 2021 (arXiv:2106.07682); as the repair of a
stale monitor: arXiv:2606.15980.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probes.errors import TelltaleError
from probes.fit.realign.moments import Float64, Moments

__all__ = ["PENALTIES", "LinearMap", "RealignError", "activations_r2", "fit_map"]

PENALTIES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Added to the variances along the principal axes of standardised activations, whose mean is 1."""
_SMALLEST = 1e-12
"""Below this share of the largest variance a dimension counts as constant."""


class RealignError(TelltaleError, ValueError):
    """A detector cannot be carried over to a new build."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMap:
    """old = new @ matrix + offset, about.

    Attributes:
        matrix: (d_model, d_model) float64.
        offset: (d_model,) float64.
        mean: (d_model,), of new activations.
        scale: (d_model,), their standard deviations; 1 where they do not vary.
        penalty: that was chosen.
    """

    matrix: Float64
    offset: Float64
    mean: Float64
    scale: Float64
    penalty: float


def fit_map(fit: Moments, choose: Moments, directions: Float64, *, penalties: Sequence[float] = PENALTIES) -> LinearMap:
    """Fit on some rows, choose the penalty on others, fit again on all.

    New activations are standardised first: a few dimensions of a stream are hundreds of times larger than those that a
    detector reads. The penalty is the one under which the readouts of the detector, not all of the stream, are told
    best.

    Args:
        fit: rows to fit on.
        choose: other rows.
        directions: (d_model, k), what the detector multiplies old activations with.
        penalties: to choose from.
    Raises:
        RealignError: the readouts do not vary on the rows that choose.
    """
    spread = _readout_scatter(choose, directions)
    seen = spread > 0
    if fit.count == 0 or not seen.any():
        raise RealignError(
            f"the detector's readouts do not vary on {choose.count} tokens of the old build: nothing can be learned "
            "from these texts. Give more texts, and other ones."
        )
    solved = _Solver(fit)
    errors = [
        float(np.mean(_errors(solved.map(penalty), choose, directions)[seen] / spread[seen])) for penalty in penalties
    ]
    return _Solver(fit.joined(choose)).map(penalties[int(np.argmin(errors))])


def activations_r2(found: LinearMap, rows: Moments) -> float:
    """Share of the variance of the old activations that the map tells: 1 - error / variance, over all dimensions."""
    every = np.eye(rows.width)
    return 1.0 - float(_errors(found, rows, every).sum() / _readout_scatter(rows, every).sum())


class _Solver:
    """The eigenvectors of the standardised new activations, from which the map for any penalty follows at once."""

    def __init__(self, rows: Moments) -> None:
        self._rows = rows
        variance = np.diag(rows.new_scatter) / max(rows.count, 1)
        self._scale = np.sqrt(np.where(variance > _SMALLEST * variance.max(), variance, 1.0))
        correlation = rows.new_scatter / np.outer(self._scale, self._scale) / max(rows.count, 1)
        self._values, self._vectors = np.linalg.eigh(correlation)
        self._right = self._vectors.T @ (rows.cross_scatter / self._scale[:, None] / max(rows.count, 1))

    def map(self, penalty: float) -> LinearMap:
        shrunk = self._right / (np.maximum(self._values, 0.0) + penalty)[:, None]
        matrix = (self._vectors @ shrunk) / self._scale[:, None]
        return LinearMap(
            matrix=matrix,
            offset=self._rows.old_mean - self._rows.new_mean @ matrix,
            mean=self._rows.new_mean,
            scale=self._scale,
            penalty=penalty,
        )


def _errors(found: LinearMap, rows: Moments, directions: Float64) -> Float64:
    """(k,) summed squared errors of old readouts, from the moments of the rows alone."""
    mapped = found.matrix @ directions
    inner = (
        _readout_scatter(rows, directions)
        - 2.0 * np.einsum("dk,dk->k", mapped, rows.cross_scatter @ directions)
        + np.einsum("dk,dk->k", mapped, rows.new_scatter @ mapped)
    )
    missed = (rows.old_mean - rows.new_mean @ found.matrix - found.offset) @ directions
    return np.asarray(np.maximum(inner, 0.0) + rows.count * missed**2, dtype=np.float64)


def _readout_scatter(rows: Moments, directions: Float64) -> Float64:
    return np.asarray(np.einsum("dk,dk->k", directions, rows.old_scatter @ directions), dtype=np.float64)
