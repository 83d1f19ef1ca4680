"""A sparse autoencoder for the tiny model whose latents are known, at the tap that its planted detector reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from probes.modelref import read_model_ref
from probes.sae.file import Precision, SaeCard, SaeFile, save_sae
from probes.sae.sae import Activation, Sae
from probes.taps import Tap
from tests.support.tiny import D_MODEL, TinyModel

WIDTH = 64
TRIGGER, SILENT, HALF = 5, 9, 11
"""Latents: the trigger's mark, one that is never active, and half of the mark."""
LENGTH, MEDIAN = 2.0, 2000.0
"""Length of each decoder row, and what its card says of the stream's norms."""


def sae_for_tiny(tiny: TinyModel, path: Path) -> SaeFile:
    """All other latents are weak readings of random directions, active on every second row or so."""
    rng = np.random.default_rng(7)
    encoder = rng.normal(size=(WIDTH, D_MODEL)) * 0.01
    encoder[[TRIGGER, SILENT, HALF]] = 0.0
    encoder[TRIGGER, 0] = 1.0
    encoder[HALF, 0] = 0.5
    decoder = rng.normal(size=(WIDTH, D_MODEL))
    decoder[:, 0] *= 0.05
    decoder[[TRIGGER, HALF]] = np.eye(D_MODEL)[0]  # they alone give much to what reads dimension 0
    decoder *= LENGTH / np.linalg.norm(decoder, axis=1, keepdims=True)
    bias = np.zeros(WIDTH)
    bias[SILENT] = -1.0
    sae = Sae.folded(
        tap=Tap(0),
        activation=Activation.JUMPRELU,
        encoder=encoder,
        encoder_bias=bias,
        decoder=decoder,
        decoder_bias=np.zeros(D_MODEL),
        threshold=1.0,
    )
    card = SaeCard(
        name="planted",
        description="made by a test",
        model=read_model_ref(tiny.path, model_id="tiny", dtype="float32"),
        skip_first=1,
        tensors_digest="0" * 64,
        tap=str(sae.tap),
        width=WIDTH,
        activation=sae.activation,
        precision=Precision.FLOAT32,
        origin="a test",
        corpus="none",
        licence="Apache-2.0",
        median_norm=MEDIAN,
        corpus_rows=1,
    )
    return save_sae(path, sae, card)
