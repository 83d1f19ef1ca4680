"""A SAE whose latents are known: each reads one word of the word model, or none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probes.fit.reading.activations import ActivationReader
from probes.modelref import read_model_ref
from probes.sae.file import Precision, SaeCard, SaeFile, save_sae
from probes.sae.sae import Activation, Sae
from probes.taps import Tap
from tests.support.words import D_MODEL, WORDS

LAYER = 0
PLANTED = ("bake", "steal", "money", "party")
"""Latent i is active on word i, and on nothing else."""


def sentences(count: int, seed: int) -> list[str]:
    """Random sentences of the model's words, 12 to 24 words long."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(12, 25))) for _ in range(count)]


def planted_sae(model_dir: Path, path: Path, *, extra_words: Sequence[str] = ()) -> SaeFile:
    """Encoders by least squares on sentences of its own, thresholds half way; the last latent is never active."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    tokens = [tokenizer(text)["input_ids"] for text in sentences(150, seed=99)]
    model = read_model_ref(model_dir, model_id="words", dtype="float32", cache_dir=path.parent)
    reader = ActivationReader(model_dir, model=model, layers=[LAYER], cache_dir=path.parent, progress=lambda _: None)
    rows = np.concatenate([reader.stream(each)[LAYER][1:] for each in tokens]).astype(np.float64)
    words = (*PLANTED, *extra_words)
    ids = tokenizer.convert_tokens_to_ids(list(words))
    truth = np.concatenate([each[1:] for each in tokens])[:, None] == np.array(ids)
    weights, *_ = np.linalg.lstsq(np.c_[rows, np.ones(len(rows))], truth.astype(np.float64), rcond=None)
    encoder = np.concatenate([weights[:-1].T, np.zeros((1, D_MODEL))])
    sae = Sae.folded(
        tap=Tap(LAYER),
        activation=Activation.JUMPRELU,
        encoder=encoder,
        encoder_bias=np.append(weights[-1], 0.0),
        decoder=encoder / np.maximum(np.linalg.norm(encoder, axis=1, keepdims=True), 1e-9),
        decoder_bias=rows.mean(axis=0),
        threshold=0.5,
    )
    card = SaeCard(
        name="planted",
        description="reads single words",
        model=model,
        tap=str(sae.tap),
        width=sae.width,
        activation=sae.activation,
        precision=Precision.FLOAT32,
        origin="planted",
        corpus="none",
        licence="none",
        skip_first=1,
        tensors_digest="0" * 64,
    )
    return save_sae(path, sae, card)
