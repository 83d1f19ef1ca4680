"""Which latents were active where a detector flagged a request. Offline: the request is read again, and encoded whole.

For a detector that reads one direction at the SAE's tap, the latents' parts of its score are told too; see
``probes.sae.active``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoTokenizer

from probes.artifact import Artifact
from probes.cachedir import user_cache_dir
from probes.card import Format
from probes.detectors import Detector, load_detector
from probes.errors import TelltaleError
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.rendered import Rendered
from probes.fit.reading.scores import score_requests
from probes.fit.rows.example import Example
from probes.modelref import read_model_ref
from probes.sae.active import ActiveRow, active_rows
from probes.sae.describe.description import Description, DescriptionError
from probes.sae.describe.reading import read_requests
from probes.sae.file import SaeFile

__all__ = ["ActiveLatent", "ExplainError", "ExplainedToken", "Explaining", "Explanation", "explain"]


class ExplainError(TelltaleError, ValueError):
    """It is not said which tokens are to be explained, or they are not there."""


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ActiveLatent(_Plain):
    """A latent at a token."""

    latent: int
    activity: float
    size: float = Field(
        description="length of what it writes: activity times the decoder row's length; without a row's own scale"
    )
    part: float | None = Field(description="of the detector's score; None: the detector is no direction at this tap")
    title: str | None = Field(description="from the description, if one was given")


class ExplainedToken(_Plain):
    """A token, and what was active there."""

    position: int
    text: str
    score: float | None = Field(description="of the detector")
    flagged: bool = Field(description="whether the score lies above the threshold, or the position was named")
    active: int = Field(description="latents that are active, told or not")
    unexplained: float | None = Field(
        description="the score without all latents' parts: the detector's constant, the decoder's bias, and what the "
        "SAE does not reconstruct"
    )
    latents: tuple[ActiveLatent, ...]


class Explanation(_Plain):
    """Of one request."""

    sae: str
    tap: str
    detector: str | None
    threshold: float | None
    read_tokens: int
    tokens: tuple[ExplainedToken, ...]

    def lines(self) -> Iterator[str]:
        """For people."""
        for token in self.tokens:
            score = "" if token.score is None else f"  score {token.score:.4g}"
            mark = "  FLAGGED" if token.flagged else ""
            yield f"{token.position:6} {token.text!r}{score}{mark}  ({token.active} latents active)"
            for latent in token.latents:
                part = "" if latent.part is None else f"  {latent.part:+.4g} of the score"
                named = f"  {latent.title}" if latent.title else ""
                yield f"         latent {latent.latent:6}  activity {latent.activity:.4g}{part}{named}"
            if token.unexplained is not None:
                yield f"         not by latents: {token.unexplained:+.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explaining:
    """How a request is explained.

    Attributes:
        model_dir: folder of the model, in transformers' layout.
        model_id: what people call it.
        progress: told what is being done.
        text_format: how the request reached the model.
        tokens: how many are told, those with the highest score.
        top: latents told of each.
    """

    model_dir: Path
    model_id: str
    progress: Callable[[str], None]
    text_format: Format = Format.CHAT
    tokens: int = 5
    top: int = 5


def explain(
    file: SaeFile,
    request: Example,
    how: Explaining,
    *,
    detector: Artifact | None = None,
    threshold: float | None = None,
    positions: Sequence[int] = (),
    description: Description | None = None,
) -> Explanation:
    """Read one request again, and tell the latents at its flagged tokens.

    Args:
        file: of the SAE.
        request: with its response, where it is the reply that was flagged.
        how: all else.
        detector: that flagged it: its tokens with the highest scores are told.
        threshold: of the detector; tokens above it are marked.
        positions: of tokens, as a record names them; told in the place of the highest scores.
        description: of the SAE, for titles.
    Raises:
        ExplainError: neither detector nor positions are given, or a position is not read.
        probes.artifact.ArtifactError: SAE or detector belong to another model.
        probes.sae.describe.description.DescriptionError: the description is of another SAE.
    """
    if detector is None and not positions:
        raise ExplainError("which tokens? Name the detector that flagged the request, or positions.")
    if description is not None and description.tensors_digest != file.card.tensors_digest:
        raise DescriptionError(
            f"the description is of {description.sae!r} with other weights than {file.path}. Describe this one: "
            "telltale sae describe."
        )
    loaded = None if detector is None else load_detector(detector)
    reader = _open(file, detector, loaded, how)
    rendered = read_requests(reader, [request], how.text_format)[0]
    skip_first = file.card.skip_first
    sae = file.sae()
    scores = _scores(reader, rendered, loaded, skip_first if detector is None else detector.card.skip_first)
    read = rendered.positions(skip_first)
    chosen = _chosen(read, scores, positions, how.tokens)
    found = next(iter(reader.sweep([rendered], [sae.tap], label="request")))[1][sae.tap]
    tokenizer: Any = AutoTokenizer.from_pretrained(str(how.model_dir), local_files_only=True)
    told = []
    for position, row in zip(chosen, active_rows(sae, found[chosen], top=how.top, detector=loaded), strict=True):
        score = scores.get(int(position))
        above = score is not None and threshold is not None and score > threshold
        told.append(
            ExplainedToken(
                position=int(position),
                text=str(tokenizer.decode([rendered.tokens[int(position)]])),
                score=score,
                flagged=above or int(position) in positions,
                active=row.active,
                unexplained=None if row.by_latents is None or score is None else score - row.by_latents,
                latents=_latents(row, description),
            )
        )
    return Explanation(
        sae=file.card.name,
        tap=str(sae.tap),
        detector=None if detector is None else detector.card.name,
        threshold=threshold,
        read_tokens=len(read),
        tokens=tuple(told),
    )


def _open(file: SaeFile, artifact: Artifact | None, detector: Detector | None, how: Explaining) -> ActivationReader:
    model = read_model_ref(how.model_dir, model_id=how.model_id, dtype=file.card.model.dtype)
    file.require_model(model)
    layers = {file.tap.layer}
    if artifact is not None and detector is not None:
        artifact.require_model(model)
        layers |= {directions.tap.layer for directions in detector.directions()}
    return ActivationReader(
        how.model_dir, model=model, layers=sorted(layers), cache_dir=user_cache_dir(), progress=how.progress
    )


def _scores(
    reader: ActivationReader, request: Rendered, detector: Detector | None, skip_first: int
) -> dict[int, float]:
    """Position -> score; of a detector with several numbers a token, the largest."""
    if detector is None:
        return {}
    found = score_requests([detector], [request], reader, skip_first=[skip_first], label="request")[0][0]
    values = found.scores.reshape(len(found.scores), -1).max(axis=1) if len(found.scores) else found.scores
    return {int(position): float(value) for position, value in zip(found.positions, values, strict=True)}


def _chosen(
    read: npt.NDArray[np.int64], scores: dict[int, float], positions: Sequence[int], count: int
) -> npt.NDArray[np.int64]:
    if missing := sorted(set(positions) - set(read.tolist())):
        span = f"{read[0]} to {read[-1]}" if len(read) else "none"
        raise ExplainError(
            f"positions {missing} are not read; of this request that is {span}. Sinks and the prompt of a reply "
            "are left out."
        )
    if positions:
        return np.array(sorted(set(positions)), dtype=np.int64)
    scored = [position for position in read.tolist() if position in scores]
    highest = sorted(scored, key=lambda position: (-scores[position], position))[:count]
    if not highest:
        raise ExplainError("no token of the request is scored: it is shorter than the sink. Give the whole request.")
    return np.array(sorted(highest), dtype=np.int64)


def _latents(row: ActiveRow, description: Description | None) -> tuple[ActiveLatent, ...]:
    return tuple(
        ActiveLatent(
            latent=each.latent,
            activity=each.activity,
            size=each.size,
            part=each.part,
            title=None if description is None else description.latents[each.latent].title,
        )
        for each in row.latents
    )
