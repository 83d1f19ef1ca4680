"""The control of an autoencoder: random directions that are as sparse, so that sparsity alone explains nothing."""

from __future__ import annotations

import numpy as np

from probes.sae.sae import Activation, Sae
from probes.sae.train.rows import Float32
from probes.taps import Tap

__all__ = ["random_directions"]


def random_directions(rows: Float32, *, tap: Tap, width: int, l0: float, seed: int) -> Sae:
    """Random unit vectors as encoder and decoder, each with the threshold that makes it active as often as the others.

    The decoder's length is the one number that fits the rows best, by least squares: the control is given what an
    untrained one can have.

    Args:
        rows: (n, d_model), what thresholds and length are fitted on.
        tap: what it reads.
        width: number of latents.
        l0: active latents per row, on average.
        seed: of the directions.
    """
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((width, rows.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    mean = rows.mean(axis=0, dtype=np.float64)
    centred = rows - mean.astype(np.float32)
    values = centred @ directions.T.astype(np.float32)
    place = min(max(round(len(rows) * (1 - l0 / width)), 0), len(rows) - 1)
    thresholds = np.maximum(np.partition(values, place, axis=0)[place], 0.0)
    codes = np.where(values > thresholds, values, 0.0)
    given = codes @ directions.astype(np.float32)
    energy = float(np.square(given, dtype=np.float64).sum())
    length = float((centred.astype(np.float64) * given).sum()) / energy if energy else 1.0
    return Sae.folded(
        tap=tap,
        activation=Activation.JUMPRELU,
        encoder=directions,
        encoder_bias=np.zeros(width),
        decoder=directions * length,
        decoder_bias=mean,
        threshold=thresholds,
        subtracts_decoder_bias=True,
    )
