"""Sparse autoencoders in memory, for tests: random weights, with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from probes.sae.file import Precision, SaeCard, SaeFile
from probes.sae.normalisation import Normalisation
from probes.sae.sae import Activation, Sae
from probes.taps import Tap
from tests.unit.artifacts import D_MODEL, DIGEST, model_ref

WIDTH = 12


def random_sae(
    seed: int = 0,
    *,
    activation: Activation = Activation.JUMPRELU,
    normalisation: Normalisation = Normalisation.NONE,
    tap: Tap = Tap(1),  # noqa: B008 - immutable
    output_tap: Tap | None = None,
) -> Sae:
    """Weights of the papers, folded: biases that matter, decoder rows of different lengths."""
    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {
        "tap": tap,
        "encoder": rng.normal(size=(WIDTH, D_MODEL)),
        "decoder": rng.normal(size=(WIDTH, D_MODEL)),
        "decoder_bias": rng.normal(size=D_MODEL),
        "subtracts_decoder_bias": bool(seed % 2),
        "normalisation": normalisation,
    }
    vectors = rng.normal(size=(3, WIDTH))
    if activation is Activation.GATED:
        return Sae.gated(**parts, gate_bias=vectors[0], log_gain=vectors[1], magnitude_bias=vectors[2])
    threshold = np.zeros(WIDTH) if activation is Activation.RELU else np.abs(vectors[0])
    return Sae.folded(
        **parts, activation=activation, encoder_bias=vectors[1], threshold=threshold, output_tap=output_tap
    )


def stored_sae(sae: Sae, **changes: Any) -> SaeFile:
    """As if it had been read from ``sae.safetensors``."""
    fields: dict[str, Any] = {
        "name": "layer1",
        "description": "made by a test",
        "model": model_ref(),
        "skip_first": 1,
        "tensors_digest": DIGEST,
        "tap": str(sae.tap),
        "output_tap": None if sae.output_tap is None else str(sae.output_tap),
        "width": sae.width,
        "activation": sae.activation,
        "normalisation": sae.normalisation,
        "precision": Precision.FLOAT32,
        "origin": "a test",
        "corpus": "not stated",
        "licence": "not stated",
        "median_norm": 8.0,
        "corpus_rows": 100,
    }
    names = ("encoder", "encoder_bias", "threshold", "decoder", "decoder_bias")
    tensors = {name: getattr(sae, name) for name in names}
    return SaeFile(path=Path("sae.safetensors"), card=SaeCard(**(fields | changes)), tensors=tensors)
