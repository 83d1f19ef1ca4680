"""What was trained, in the form that is served: raw coordinates, decoder rows of norm 1."""

from __future__ import annotations

import numpy as np

from probes.sae.sae import Activation, Sae
from probes.sae.train.trainer import Trained
from probes.taps import Tap

__all__ = ["exported"]


def exported(trained: Trained, *, tap: Tap, activation: Activation) -> Sae:
    """Fold the scaling in.

    With ``x' = c (x - m)`` the training has ``f' = w.(x' - b_d) + b`` and ``x'^ = W f' + b_d``. Divided by ``c``, the
    codes ``f = f'/c`` are in the stream's own units: ``f = w.(x - m - b_d/c) + b/c``, and ``x^ = W f + m + b_d/c``. So
    encoder and decoder stay what they are, and the decoder's rows have the norm 1: a code is how far the row goes
    along its direction. The encoder is rounded to float16 before the biases are folded, as it may be stored so.

    Args:
        trained: in normalised coordinates.
        tap: what it reads.
        activation: what it was trained with.
    """
    model, factor = trained.model, trained.scaling.factor
    parts = {name: tensor.numpy().astype(np.float64) for name, tensor in model.state_dict().items()}
    return Sae.folded(
        tap=tap,
        activation=activation,
        encoder=parts["encoder"].astype(np.float16),
        encoder_bias=parts["encoder_bias"] / factor,
        decoder=parts["decoder"].astype(np.float16),
        decoder_bias=trained.scaling.mean + parts["decoder_bias"] / factor,
        threshold=trained.thresholds.numpy().astype(np.float64) / factor,
        subtracts_decoder_bias=True,
    )
