"""How well an autoencoder gives rows back, and how sparsely: variance, active latents, latents that never are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.sae.sae import Sae
from probes.sae.train.rows import RowPool

__all__ = ["Reconstruction", "measure_reconstruction"]

_BATCH = 4096

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Reconstruction:
    """Of some rows.

    Attributes:
        rows: their number.
        fvu: sum of |s - s'|^2 over sum of |s - mean|^2, the mean being that of these rows.
        l0: active latents per row, on average.
        density: (width,) share of the rows at which each latent is active.
        median_norm: of the rows.
    """

    rows: int
    fvu: float
    l0: float
    density: Float64
    median_norm: float

    @property
    def dead_share(self) -> float:
        """Share of the latents that are active at none of the rows."""
        return float(np.mean(self.density == 0))


def measure_reconstruction(sae: Sae, rows: RowPool) -> Reconstruction:
    """In one pass, in batches.

    Args:
        sae: as it is served.
        rows: without sinks.
    """
    active = np.zeros(sae.width, dtype=np.int64)
    total = np.zeros(sae.d_model)
    squares = left = 0.0
    norms = np.empty(len(rows))
    for start in range(0, len(rows), _BATCH):
        batch = rows.take(np.arange(start, min(start + _BATCH, len(rows))))
        codes = sae.encode(batch)
        active += np.count_nonzero(codes, axis=0)
        exact = batch.astype(np.float64)
        left += float(np.square(exact - sae.decode(codes, batch)).sum())
        of_rows = np.square(exact).sum(axis=1)
        norms[start : start + len(batch)] = np.sqrt(of_rows)
        squares += float(of_rows.sum())
        total += exact.sum(axis=0)
    count = len(rows)
    variance = squares - float(total @ total) / count
    return Reconstruction(count, left / variance, float(active.sum()) / count, active / count, float(np.median(norms)))
