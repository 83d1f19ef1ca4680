"""The card of an artifact: what a detector is, which model it belongs to, what may be said of it. Plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from probes.aggregate import AnyAggregator
from probes.speaker import Speaker
from probes.threshold import ThresholdMethod

FORMAT_VERSION: Literal[1] = 1


class Stage(StrEnum):
    """When a statistic is judged."""

    PROMPT = "prompt"
    """Once, after the last prompt token and before the first generated one."""
    STREAM = "stream"
    """At every token of the reply."""
    RESPONSE = "response"
    """Once, when the reply has ended, however it ended."""


class Format(StrEnum):
    """How the text reached the model."""

    CHAT = "chat"
    """Messages, through the model's chat template."""
    RAW = "raw"
    """Text or tokens as they are (``/v1/completions``, for one)."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256, hexadecimal")]


def _largest_first(scores: tuple[float, ...]) -> tuple[float, ...]:
    if any(left < right for left, right in pairwise(scores)):
        raise ValueError("must stand largest first: a threshold is read from it by rank")
    return scores


TopScores = Annotated[
    tuple[float, ...],
    Field(min_length=1, description="the largest benign statistics, largest first"),
    AfterValidator(_largest_first),
]


def _least_first(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) == 1 or any(left > right for left, right in pairwise(values)):
        raise ValueError("must be two at least and stand least first")
    return values


Quantiles = Annotated[
    tuple[float, ...],
    Field(
        exclude_if=lambda values: not values,
        description="evenly spaced quantiles of the benign statistics, from the least to the largest: what live ones "
        "are compared with; empty on cards that were made before there were any",
    ),
    AfterValidator(_least_first),
]


class ModelRef(_Strict):
    """The model that a detector was trained and calibrated on. It is served with exactly this one."""

    id: str = Field(description="name for people")
    weight_digest: Digest = Field(description="SHA-256 over the names and SHA-256s of the weight files")
    tokenizer_digest: Digest
    chat_template_digest: Digest
    d_model: int = Field(gt=0, description="width of the residual stream")
    num_layers: int = Field(gt=0)
    dtype: str = Field(description="dtype of the weights as served, e.g. float32")

    def differing(self, other: ModelRef) -> tuple[str, ...]:
        """The fields in which two models differ; the name is none of them."""
        fields = [field for field in type(self).model_fields if field != "id"]
        return tuple(field for field in fields if getattr(self, field) != getattr(other, field))


class LengthBucket(_Strict):
    """The threshold for requests up to a length, and the benign requests of such lengths that it rests on."""

    max_tokens: int | None = Field(
        ge=1, description="longest read sequence that it is for, in tokens; None: longer than all others"
    )
    threshold: float = Field(description="fires above it, strictly")
    num_benign: int = Field(gt=0, description="benign requests of these lengths that were scored")
    certified: bool = Field(description="whether num_benign suffices for the calibration's target_fpr")
    top_scores: TopScores


class Platt(_Strict):
    """The probability that a request is positive: 1 / (1 + exp(-(slope * statistic + intercept))) (Platt, 1999)."""

    slope: float
    intercept: float
    num_positive: int = Field(gt=0, description="labelled requests that it was fitted on")
    num_negative: int = Field(gt=0)
    ece_before: float = Field(ge=0, le=1, description="calibration error of the statistic taken as a logit")
    ece_after: float = Field(ge=0, le=1, description="of the probability, on rows that it was not fitted on")
    data_digest: Digest

    def probability(self, statistic: float) -> float:
        """0 to 1, at the share of positives among the rows that it was fitted on."""
        # The logistic function, written so that nothing overflows.
        return 0.5 * (1.0 + math.tanh(0.5 * (self.slope * statistic + self.intercept)))


class Calibration(_Strict):
    """A threshold for one statistic, and the benign requests that it rests on.

    ``target_fpr`` may be asked for wherever ``top_scores`` reaches far enough: the threshold is then read from them.
    """

    stage: Stage
    format: Format
    aggregate: AnyAggregator
    threshold: float = Field(description="the artifact's own threshold: fires above it, strictly")
    target_fpr: float = Field(gt=0, lt=1, description="share of benign requests that may fire")
    confidence: float = Field(default=0.95, gt=0, lt=1)
    method: ThresholdMethod = Field(default=ThresholdMethod.PAC, description="what the threshold promises")
    num_benign: int = Field(gt=0, description="benign requests that were scored")
    top_scores: TopScores
    quantiles: Quantiles = ()
    data_digest: Digest
    certified: bool = Field(description="whether num_benign suffices for target_fpr at this confidence")
    buckets: tuple[LengthBucket, ...] = Field(
        default=(), description="thresholds by length, shortest first, in the place of the one for all lengths"
    )
    platt: Platt | None = Field(default=None, description="how the statistic becomes a probability")

    @model_validator(mode="after")
    def _certifies_what_it_can(self) -> Self:
        if self.method is ThresholdMethod.CONFORMAL and (self.certified or any(b.certified for b in self.buckets)):
            raise ValueError("a conformal threshold is not certified: it states no confidence")
        return self

    @model_validator(mode="after")
    def _buckets_cover_all_lengths(self) -> Self:
        if not self.buckets:
            return self
        if self.stage is Stage.STREAM:
            raise ValueError("buckets at the stage stream: how long a reply will be is not known while it is judged")
        ends = [math.inf if bucket.max_tokens is None else bucket.max_tokens for bucket in self.buckets]
        if len(ends) == 1 or ends[-1] != math.inf or any(left >= right for left, right in pairwise(ends)):
            raise ValueError("buckets: at least two, shortest first, the last one without max_tokens")
        return self


class Canary(_Strict):
    """A known prompt and the scores that this detector gives it, computed by transformers and not by ourselves.

    A server sends the prompt through its engine and compares: when it starts, and again and again while it runs.
    """

    tokens: tuple[int, ...] = Field(min_length=8, max_length=64, description="the prompt, as token ids")
    scores: tuple[float, ...] = Field(
        min_length=1, description="of the tokens after the leading skip_first ones; of each token all its numbers"
    )
    tolerance: float = Field(gt=0, description="greatest difference that is still the same score, in the score's unit")
    reference: str = Field(description="what computed the scores, e.g. 'transformers 5.0.0, float32'")


class ArtifactCard(_Strict):
    """What the card of every artifact says, a detector's and a steering direction's."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")
    description: str = Field(min_length=1)
    model: ModelRef
    skip_first: int = Field(ge=0, description="leading positions with a sink's norm: never scored, never written to")
    tensors_digest: Digest = Field(description="SHA-256 of the safetensors file")
    training: dict[str, Any] = Field(default_factory=dict, description="how to repeat it: data, digests, settings")
    evaluation: dict[str, Any] = Field(default_factory=dict, description="measured quality, controls beside it")
    created_by: str = Field(default="", description="version that wrote it")


class Card(ArtifactCard):
    """Everything that is known about one detector."""

    kind: str
    parameters: dict[str, Any] = Field(default_factory=dict, description="of the kind, where tensors do not say it")
    taps: tuple[str, ...] = Field(min_length=1)
    formats: tuple[Format, ...] = Field(min_length=1, description="formats that it was calibrated for")
    segments: tuple[Speaker, ...] = Field(
        default=(),
        exclude_if=lambda named: not named,
        description="whose text of a prompt it was fitted and calibrated on, and rules read; empty: all",
    )
    calibrations: tuple[Calibration, ...] = ()
    canary: Canary | None = Field(
        default=None, description="None: only coverage can be proved, not that scores are right"
    )

    def with_calibrations(self, found: Sequence[Calibration]) -> Self:
        """The card with further calibrations, each in the place of the one for the same statistic; formats grow."""
        kept = {(item.stage, item.format, item.aggregate): item for item in (*self.calibrations, *found)}
        formats = dict.fromkeys([*self.formats, *(item.format for item in found)])
        return self.model_copy(update={"calibrations": tuple(kept.values()), "formats": tuple(formats)})

    @model_validator(mode="after")
    def _reads_segments_of_chats(self) -> Self:
        if not self.segments:
            return self
        if len(set(self.segments)) != len(self.segments):
            raise ValueError("'segments' names one twice")
        if self.formats != (Format.CHAT,) or any(item.stage is not Stage.PROMPT for item in self.calibrations):
            raise ValueError("with 'segments' the format is chat alone and the stage prompt: nothing else has speakers")
        return self

    @model_validator(mode="after")
    def _one_calibration_each(self) -> Self:
        keys = [(item.stage, item.format, item.aggregate) for item in self.calibrations]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"two calibrations for {key[2]} at {key[0].value} in the format {key[1].value}")
        return self

    @model_validator(mode="after")
    def _as_many_scores_a_token(self) -> Self:
        canary = self.canary
        if canary is None:
            return self
        scored = len(canary.tokens) - self.skip_first
        if scored < 1 or len(canary.scores) % scored:
            raise ValueError(
                f"the canary has {len(canary.scores)} scores for {len(canary.tokens)} tokens, of which the first "
                f"{self.skip_first} are not scored"
            )
        return self
