"""Random directions that are active as often as a SAE's latents: what any features are held against.

Features of random directions also look as if they meant something (Heap et al. 2025, arXiv:2501.17727), so a figure of
a SAE says something only beside theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.taps import Tap

__all__ = ["RandomDirections", "draw_random_directions"]

_AT_ONCE = 512

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RandomDirections:
    """An encoder of random directions; see ``probes.sae.describe.codes.Encoder``.

    Attributes:
        tap: where they read.
        rows: (width, d_model) float32, each of length 1.
        offset: (d_model,) float32, what is taken off a row first: the mean of the rows they were drawn for.
        thresholds: (width,) float32; below, a direction is not active.
    """

    tap: Tap
    rows: Float32
    offset: Float32
    thresholds: Float32

    @property
    def width(self) -> int:
        """Number of directions."""
        return len(self.rows)

    def encode(self, rows: Float32) -> Float32:
        """(n, width): the part above the threshold, 0 below."""
        return np.maximum((rows - self.offset) @ self.rows.T - self.thresholds, 0.0, dtype=np.float32)


def draw_random_directions(
    tap: Tap, sample: Float32, density: npt.NDArray[np.float64], *, seed: int
) -> RandomDirections:
    """Directions that are active on as large a share of ``sample`` as asked for.

    Args:
        tap: where the rows come from.
        sample: (n, d_model), sinks left out.
        density: (width,) share of rows on which each is to be active.
        seed: of the draw.
    """
    directions = np.random.default_rng(seed).normal(size=(len(density), sample.shape[1])).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    offset = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    # As many of the sample's rows lie above the threshold as the latent is active on.
    place = np.clip(np.ceil(len(sample) * (1 - density)).astype(np.int64) - 1, 0, len(sample) - 1)
    centred = sample - offset
    thresholds = np.empty(len(density), dtype=np.float32)
    for start in range(0, len(density), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        along = np.sort(centred @ directions[part].T, axis=0)
        thresholds[part] = along[place[part], np.arange(along.shape[1])]
    return RandomDirections(tap, directions, offset, thresholds)
