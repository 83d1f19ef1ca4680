"""Which latents are active on a row, and their parts of a linear detector's score. Plain arithmetic.

For a detector that reads one direction at the SAE's tap the score is ``w.s + b``, and ``s`` is the reconstruction and
an error, so latent i gives ``f_i (w.d_i)``, and what is left over stands beside them. These are parts of a sum, not
causes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.detectors import Detector
from probes.sae.normalisation import row_scale
from probes.sae.sae import Sae

__all__ = ["ActiveLatent", "ActiveRow", "active_rows", "score_per_latent"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ActiveLatent:
    """A latent on a row.

    Attributes:
        latent: its number.
        activity: its code.
        size: length of what it writes: activity times the decoder row's length; without a row's own scale.
        part: of the detector's score; None where that is no direction at this tap.
    """

    latent: int
    activity: float
    size: float
    part: float | None


@dataclass(frozen=True, slots=True)
class ActiveRow:
    """A row.

    Attributes:
        active: latents that are active, told or not.
        by_latents: sum of all their parts; None where the detector is no direction at this tap.
        latents: those that are told: with the largest parts, in size, or where there are none with the largest sizes.
    """

    active: int
    by_latents: float | None
    latents: tuple[ActiveLatent, ...]


def score_per_latent(sae: Sae, detector: Detector | None) -> Float64 | None:
    """(width,) what one unit of each latent gives to a detector's score, where that is a direction at the SAE's tap."""
    if detector is None or not detector.score_is_readout or sae.is_transcoder:
        return None
    (directions,) = detector.directions()
    if directions.tap != sae.tap:
        return None
    along: Float64 = sae.decoder.astype(np.float64) @ directions.weight[:, 0]
    return along


def active_rows(
    sae: Sae, rows: npt.NDArray[np.floating], *, top: int, detector: Detector | None = None
) -> list[ActiveRow]:
    """Encode rows whole.

    Args:
        sae: all of it.
        rows: (n, d_model) of the residual stream at its tap.
        top: latents told of each, at most; only active ones are.
        detector: whose score is to be taken apart.
    """
    stream = rows.astype(np.float64)
    codes = sae.encode(stream)
    along = score_per_latent(sae, detector)
    scale = row_scale(sae.normalisation, (stream**2).sum(axis=1), stream.mean(axis=1), sae.d_model)
    lengths = np.linalg.norm(sae.decoder, axis=1)
    found = []
    for row, of_row in zip(codes, scale, strict=True):
        parts = None if along is None else row.astype(np.float64) * along * of_row
        sizes = row * lengths
        ranked = np.argsort(-(sizes if parts is None else np.abs(parts)), kind="stable")[:top]
        told = tuple(
            ActiveLatent(
                latent=int(latent),
                activity=float(row[latent]),
                size=float(sizes[latent]),
                part=None if parts is None else float(parts[latent]),
            )
            for latent in ranked
            if row[latent] > 0
        )
        found.append(ActiveRow(int((row > 0).sum()), None if parts is None else float(parts.sum()), told))
    return found
