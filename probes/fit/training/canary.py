"""Writes the canary of a card: a fixed prompt and the scores that a detector gives it, by a forward of transformers.

Nothing of the serving engine takes part, so that an error in it cannot stand on both sides of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

from probes.artifact import Artifact
from probes.cachedir import user_cache_dir
from probes.card import Canary, Format
from probes.detectors import Detector, load_detector
from probes.errors import TelltaleError
from probes.fit.reading.activations import ActivationReader
from probes.fit.rows.example import Example
from probes.modelref import read_model_ref
from probes.taps import Site

__all__ = ["CanaryError", "canary_of", "make_canary"]

CANARY_TEXT = (
    "The ferry leaves at seven in the morning. How do I break into a locked car and steal it, and what is 12 times 31? "
    "Please answer in two short sentences, then write a poem."
)
"""Ordinary and objectionable by turns, so that a detector's scores spread."""
_MAX_TOKENS = 48
_MIN_TOKENS = 8
_OF_SPREAD = {"float32": 1e-2, "float16": 3e-2, "bfloat16": 1.5e-1}
"""Tolerance as a share of the standard deviation of the scores, by the dtype that is served.

On SmolLM2-135M's layer 15 the deviation from float32 was 4e-6 of it in float32 (another engine), 5e-3 in float16 and
3e-2 in bfloat16.
"""
_OF_PRODUCTS = {"float32": 1e-5, "float16": 3e-4, "bfloat16": 2e-3}
"""And at least this share of ``|s| |w|``, for scores that hardly spread; there the deviation was 8e-8, 9e-5, 6e-4."""


class CanaryError(TelltaleError, ValueError):
    """No canary can be written for a detector."""


def canary_of(artifact: Artifact, *, model_dir: Path, progress: Callable[[str], None]) -> Canary:
    """The canary of an artifact that exists already.

    Args:
        artifact: tensors and card.
        model_dir: folder of the model on the card, in transformers' layout.
        progress: told what is being done.
    Raises:
        CanaryError: the detector reads a site that transformers does not show, or the prompt is too short.
        probes.artifact.ArtifactError: the folder holds another model than the card says.
    """
    card = artifact.card
    model = read_model_ref(model_dir, model_id=card.model.id, dtype=card.model.dtype)
    artifact.require_model(model)
    detector = load_detector(artifact)
    reader = ActivationReader(
        model_dir,
        model=model,
        layers=sorted({directions.tap.layer for directions in detector.directions()}),
        cache_dir=user_cache_dir(),
        progress=progress,
    )
    return make_canary(detector, reader, skip_first=card.skip_first, dtype=card.model.dtype)


def make_canary(detector: Detector, reader: ActivationReader, *, skip_first: int, dtype: str) -> Canary:
    """Score the canary's prompt.

    Args:
        detector: what to score it with, in float64.
        reader: of the model, in float32; it must read the detector's layers.
        skip_first: leading positions that are not scored.
        dtype: of the weights as served; it widens the tolerance.
    Raises:
        CanaryError: see ``canary_of``.
    """
    tokens = reader.tokens(Example(text=CANARY_TEXT, label=0, source="canary", group="canary"), Format.RAW)
    tokens = tokens[:_MAX_TOKENS]
    if len(tokens) < max(_MIN_TOKENS, skip_first + 1):
        raise CanaryError(f"the canary's text is {len(tokens)} tokens of this model, too few to score.")
    stream = reader.stream(tokens)
    activations, products = {}, 0.0
    for directions in detector.directions():
        tap = directions.tap
        if tap.site is not Site.RESID_POST:
            raise CanaryError(f"detector {detector.name!r} reads {tap}; a canary is written for resid_post only.")
        activations[tap] = stream[tap.layer].astype(np.float64)
        longest = float(np.linalg.norm(activations[tap][skip_first:], axis=1).max())
        products = max(products, longest * float(np.linalg.norm(directions.weight, axis=0).max()))
    scores = detector.score(detector.read(activations))[skip_first:].reshape(len(tokens) - skip_first, -1)
    # A dtype that we do not know is at least not wider than bfloat16.
    share, floor = _OF_SPREAD.get(dtype, _OF_SPREAD["bfloat16"]), _OF_PRODUCTS.get(dtype, _OF_PRODUCTS["bfloat16"])
    tolerance = max(share * float(scores.std(axis=0).min()), floor * products)
    return Canary(
        tokens=tuple(tokens),
        scores=tuple(float(score) for score in scores.ravel()),
        tolerance=tolerance,
        reference=f"transformers {metadata.version('transformers')}, float32",
    )
