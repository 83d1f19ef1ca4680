"""Fits what ordinary text looks like, so that what does not can be told: a probabilistic PCA."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA

from probes.errors import TelltaleError

__all__ = ["NoveltyError", "fit_novelty"]

_ROWS_PER_COMPONENT = 10


class NoveltyError(TelltaleError, ValueError):
    """The rows do not suffice."""


def fit_novelty(rows: npt.NDArray[np.floating], *, components: int = 32) -> dict[str, npt.NDArray[np.float32]]:
    """Mean, principal components and variances, as an artifact of kind ``novelty`` holds them.

    Args:
        rows: (n, d_model), of ordinary text, sinks left out; n at least ten times ``components``.
        components: whose variance is told apart; what remains counts as one.
    Raises:
        NoveltyError: too few rows, or not fewer components than dimensions.
    """
    count, width = rows.shape
    if not 0 < components < width or count < _ROWS_PER_COMPONENT * components:
        raise NoveltyError(
            f"{components} components of {width} dimensions were asked for, {count} rows are there: the components "
            f"must be fewer than the dimensions, the rows at least {_ROWS_PER_COMPONENT} times as many as they."
        )
    model = PCA(n_components=components, svd_solver="full").fit(rows.astype(np.float64))
    return {
        "mean": model.mean_.astype(np.float32),
        "components": model.components_.astype(np.float32),
        "variance": model.explained_variance_.astype(np.float32),
        "rest_variance": np.array([model.noise_variance_], dtype=np.float32),
    }
