"""Steering vectors made of latents: FGAA (Soo et al. 2025, arXiv:2501.09929), without its effect matrix.

The difference of mean codes between the two texts of contrast pairs is cut down to few latents, and their decoder rows
are added up. FGAA then aims at the wanted codes through a linear map from steering vectors to their effects (SAE-TS,
Chalnev et al. 2024, arXiv:2411.02193). That map is costly to fit; here the decoder stands in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.aggregate.mean import Mean
from probes.card import Format
from probes.fit.rows.ordinary import read_ordinary
from probes.fit.steer.pairs import PairError, VectorMethod, direction_of, pairs_digest, read_pairs
from probes.fit.steer.vector import Subject, open_subject, write_direction
from probes.sae.describe.codes import SINK_FACTOR, read_codes
from probes.sae.describe.reading import read_requests
from probes.sae.file import SaeFile
from probes.sae.sae import Sae
from probes.steering.artifact import SteerArtifact
from probes.taps import Tap

__all__ = ["FeatureDirection", "Filters", "feature_direction", "vector_from_features"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which latents of a difference are kept.

    Attributes:
        max_density: denser ones are dropped: they stand for how text is, not for what it says. 0.01 in the paper, for
            SAEs of 16,384 latents; narrower ones have denser latents.
        positive: how many of those that the positive texts have more of.
        negative: how many of those that they have less of.
    """

    max_density: float = 0.01
    positive: int = 16
    negative: int = 0


@dataclass(frozen=True, slots=True)
class FeatureDirection:
    """A direction and what it is made of.

    Attributes:
        direction: (d_model,) float64, of length 1.
        latents: numbers, that with the largest difference first.
        weights: (latents,), difference of the mean codes.
        dense: latents with a difference that were dropped for their density.
    """

    direction: Float64
    latents: tuple[int, ...]
    weights: tuple[float, ...]
    dense: int


def feature_direction(sae: Sae, difference: Float64, density: Float64, filters: Filters) -> FeatureDirection:
    """Cut a difference of codes down, and decode it.

    Args:
        sae: whose codes they are.
        difference: (width,) mean code of the positive texts minus that of the negative ones, sinks left out: so a
            latent that is active on sinks alone has none.
        density: (width,) share of ordinary rows on which each latent is active.
        filters: what is kept.
    Raises:
        PairError: nothing is left, or the rows that are left cancel each other.
    """
    is_dense = density > filters.max_density
    sparse = np.where(is_dense, 0.0, difference)
    order = np.argsort(-sparse, kind="stable")
    chosen = [*order[: filters.positive][sparse[order[: filters.positive]] > 0]]
    last = order[::-1][: filters.negative]
    chosen += [*last[sparse[last] < 0]]
    if not chosen:
        raise PairError(
            f"no latent with a density of at most {filters.max_density:g} is more active in the texts that are to be "
            f"steered to; {int((is_dense & (difference > 0)).sum())} denser ones are. Raise --max-density, or take "
            "another SAE."
        )
    chosen.sort(key=lambda latent: (-abs(sparse[latent]), latent))
    raw: Float64 = sparse[chosen] @ sae.decoder[chosen].astype(np.float64)
    length = float(np.linalg.norm(raw))
    if length <= 1e-9 * float(np.abs(sparse[chosen]).sum()):
        raise PairError("the decoder rows of the latents cancel each other: there is no direction. Keep fewer.")
    return FeatureDirection(
        raw / length,
        tuple(int(latent) for latent in chosen),
        tuple(float(sparse[latent]) for latent in chosen),
        int((is_dense & (difference != 0)).sum()),
    )


def vector_from_features(
    file: SaeFile,
    subject: Subject,
    pairs_path: Path,
    *,
    filters: Filters,
    text_format: Format,
    out: Path,
    progress: Callable[[str], None],
) -> SteerArtifact:
    """Make a steering direction of the latents in which contrast pairs differ, and write it.

    Density is that on the fixed corpus of ordinary text, whatever the SAE was trained on.

    Args:
        file: of the SAE; it must read and write the residual stream after the subject's layer.
        subject: model, layer and card.
        pairs_path: as ``read_pairs`` takes them.
        filters: which latents are kept.
        text_format: whether texts are user messages or stand as they are.
        out: folder.
        progress: told what is being done.
    Raises:
        PairError: the SAE cannot be written, or the pairs have no direction among its latents.
        probes.artifact.ArtifactError: the SAE belongs to another model.
        probes.errors.TelltaleError: pairs or model cannot be read.
    """
    sae = file.sae()
    if sae.tap != Tap(subject.layer) or sae.is_transcoder:
        raise PairError(
            f"{file.path}: it reads {sae.tap} and writes {sae.output_tap or sae.tap}; what is steered is the residual "
            f"stream ({Tap(subject.layer)}). Take a SAE that reads and writes there."
        )
    pairs = read_pairs(pairs_path)
    reader = open_subject(subject, progress)
    file.require_model(reader.model)
    ordinary = read_ordinary(reader, subject.layer)
    skip_first = max(file.card.skip_first, ordinary.skip_first)
    texts = [text for pair in pairs for text in (pair.positive, pair.negative)]
    requests = read_requests(reader, texts, text_format)
    limit = SINK_FACTOR * ordinary.median_norm
    codes = read_codes([sae], reader, requests, skip_first=skip_first, label="pairs", max_norm=limit)[0]
    means = codes.means().astype(np.float64)
    density = (sae.encode(ordinary.rows) > 0).mean(axis=0)
    found = feature_direction(sae, (means[0::2] - means[1::2]).mean(axis=0), density, filters)
    mean = Mean()
    rows = reader.read(texts, text_format=text_format, aggregates=(mean,), skip_first=skip_first, label="pairs").at(
        subject.layer, mean
    )
    differences = rows[0::2].astype(np.float64) - rows[1::2].astype(np.float64)
    evaluation: dict[str, Any] = {
        "pairs": {
            "pairs": len(pairs),
            "reversed_share": round(float((differences @ found.direction < 0).mean()), 4),
            "cosine_with_mean_difference": round(
                float(direction_of(differences, VectorMethod.MEAN) @ found.direction), 4
            ),
        }
    }
    progress(
        f"{len(found.latents)} latents ({found.dense} denser ones dropped); cosine with the plain mean difference "
        f"{evaluation['pairs']['cosine_with_mean_difference']:.2f}"
    )
    training = {
        "method": "fgaa without effect matrix",
        "pairs": pairs_path.name,
        "pairs_digest": pairs_digest(pairs),
        "format": text_format.value,
        "sae": file.card.name,
        "sae_digest": file.card.tensors_digest,
        "latents": list(found.latents),
        "weights": [round(weight, 6) for weight in found.weights],
        "max_density": filters.max_density,
        "dense_dropped": found.dense,
    }
    return write_direction(
        subject,
        found.direction,
        model=reader.model,
        ordinary=ordinary,
        training=training,
        evaluation=evaluation,
        out=out,
    )
