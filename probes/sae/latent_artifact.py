"""A detector cut out of a sparse autoencoder: a few encoder rows with a card of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact
from probes.card import Card, Format
from probes.sae.combine import Combine, LatentParameters
from probes.sae.file import SaeFile
from probes.sae.sae import SaeError


def latent_artifact(
    stored: SaeFile,
    latents: Sequence[int],
    *,
    name: str,
    combine: Combine,
    weights: Sequence[float] = (),
    intercept: float = 0.0,
    description: str = "",
    path: Path | None = None,
    created_by: str = "",
) -> Artifact:
    """The detector over some latents, without a calibration.

    Args:
        stored: the autoencoder.
        latents: their numbers.
        name: of the detector.
        combine: what is made of their codes.
        weights: one for each latent, with ``combine: weighted`` only.
        intercept: likewise.
        description: for the card; the latents' numbers if empty.
        path: where it will be saved; the autoencoder's if it will not.
        created_by: version that makes it.
    Raises:
        SaeError: a latent does not exist, or weights or latents are too many or too few for ``combine``.
        probes.artifact.ArtifactError: the autoencoder is damaged.
    """
    if combine is Combine.SINGLE and len(latents) != 1:
        raise SaeError(
            f"combine is 'single' and {len(latents)} latents are named. Name one, or say max, sum or weighted."
        )
    weighted = combine is Combine.WEIGHTED
    if weighted != bool(weights) or (weighted and len(weights) != len(latents)):
        raise SaeError(
            f"{len(weights)} weights for {len(latents)} latents with combine: {combine.value}; 'weighted' takes one "
            "for each, the others none."
        )
    if not weighted and intercept:
        raise SaeError(f"an intercept is added to a weighted sum; combine is {combine.value!r}.")
    rows = stored.latents(latents)
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "encoder": rows.encoder,
        "encoder_bias": rows.encoder_bias,
        "threshold": rows.threshold,
    }
    if weighted:
        tensors["weight"] = np.asarray(weights, dtype=np.float32)
        tensors["intercept"] = np.asarray([intercept], dtype=np.float32)
    told = LatentParameters(
        combine=combine, normalisation=rows.normalisation, sae=stored.card.name, latents=tuple(latents)
    )
    numbers = ", ".join(map(str, latents))
    card = Card(
        name=name,
        kind="sae_latent",
        description=description or f"{combine.value} of the latents {numbers} of {stored.card.name}",
        parameters=told.model_dump(mode="json"),
        model=stored.card.model,
        taps=(str(stored.tap),),
        formats=tuple(Format),
        skip_first=stored.card.skip_first,
        tensors_digest=stored.card.tensors_digest,
        training={"sae": stored.card.name, "sae_digest": stored.card.tensors_digest},
        created_by=created_by,
    )
    return Artifact(path=path or stored.path, card=card, tensors=tensors)
