"""The condition of a rule as it stands in the policy file: one verdict, or several joined. Knows no detector."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import Discriminator, Field, Tag, model_validator

from monitor.accumulate import AnyAccumulator
from monitor.rollout import Subject
from monitor.strict import DetectorName, Strict
from monitor.types import Role
from probes.aggregate import AnyAggregator
from probes.card import Stage

Path = tuple[str | int, ...]
"""Keys on the way to a part of the policy file."""
_STAGES: Final = "prompt: once, before the first token; stream: at every token; response: once, when the reply ended"


class Above(Strict):
    """A threshold: a number, or a false-positive rate to read it from the artifact's calibration."""

    value: float | None = Field(default=None, allow_inf_nan=False, description="fires above it, strictly")
    target_fpr: float | None = Field(default=None, gt=0, lt=1, description="share of benign requests that may fire")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.value is None) == (self.target_fpr is None):
            raise ValueError("a threshold has exactly one of 'value' and 'target_fpr'")
        return self


def _require_readable(segments: tuple[Role, ...] | None, stage: Stage) -> None:
    """Refuse roles that are named twice, and those that a stage never reads."""
    if segments is None:
        return
    if doubles := sorted({role.value for role in segments if segments.count(role) > 1}):
        raise ValueError(f"'segments' names {doubles[0]!r} twice; name each role once")
    if stage is not Stage.PROMPT and Role.ASSISTANT not in segments:
        raise ValueError(
            f"'segments' is {[role.value for role in segments]} at the stage {stage.value!r}, which reads the "
            "reply: all of it counts as 'assistant', so that this rule could never fire. Use the stage 'prompt', "
            "name 'assistant' too, or leave 'segments' out."
        )


class When(Strict):
    """A verdict: one detector's statistic at one stage lies above a threshold."""

    detector: DetectorName
    stage: Stage = Field(description=_STAGES)
    aggregate: AnyAggregator | None = Field(default=None, description="the calibrated one if left out")
    above: Above | None = Field(default=None, description="the artifact's own threshold if left out")
    segments: tuple[Role, ...] | None = Field(
        default=None, min_length=1, description="whose tokens of the prompt are read; everybody's if left out"
    )

    @model_validator(mode="after")
    def _readable_segments(self) -> Self:
        _require_readable(self.segments, self.stage)
        return self


class WhenAll(Strict):
    """Several conditions, all of which must hold."""

    all: tuple[Condition, ...] = Field(min_length=1, description="conditions; true if each of them is")


class WhenAny(Strict):
    """Several conditions, one of which must hold."""

    any: tuple[Condition, ...] = Field(min_length=1, description="conditions; true if one of them is")


class WhenNot(Strict):
    """A condition that must be known not to hold."""

    negated: Condition = Field(alias="not", description="a condition; true once it is known to be false")


class Scale(StrEnum):
    """What is added up where detectors are weighed."""

    STATISTIC = "statistic"
    """The statistics as they are."""
    PROBABILITY = "probability"
    """What the card's Platt scaling makes of them, between 0 and 1."""


class Weighed(Strict):
    """A detector's statistic in a weighted sum."""

    detector: DetectorName
    weight: float = Field(
        allow_inf_nan=False,
        description="its factor, not 0; at the stage stream, such that more of the statistic makes more of the sum",
    )
    aggregate: AnyAggregator | None = Field(default=None, description="the calibrated one if left out")
    segments: tuple[Role, ...] | None = Field(
        default=None, min_length=1, description="whose tokens of the prompt are read; everybody's if left out"
    )

    @model_validator(mode="after")
    def _has_weight(self) -> Self:
        if self.weight == 0:
            raise ValueError("'weight' is 0: the detector would count for nothing. Give it a weight, or leave it out")
        return self


class Limit(Strict):
    """The threshold of a weighted sum."""

    value: float = Field(
        allow_inf_nan=False,
        description="fires above it, strictly; a number, since no card holds a calibration of the sum",
    )


class WhenWeighed(Strict):
    """A verdict on several detectors at once: the weighted sum of their statistics lies above a threshold."""

    weigh: tuple[Weighed, ...] = Field(min_length=2, description="the detectors, each with its weight")
    stage: Stage = Field(description=_STAGES)
    sum: Scale = Field(
        default=Scale.STATISTIC,
        description="of what: statistic, as the detectors give them; probability, after the cards' Platt scaling",
    )
    above: Limit = Field(description="the threshold of the sum: {value: NUMBER}")

    @model_validator(mode="after")
    def _readable_segments(self) -> Self:
        for term in self.weigh:
            _require_readable(term.segments, self.stage)
        return self


CONVERSATION: Final = "conversation"
"""The stage at which the requests of a session are judged together."""


class WhenConversation(Strict):
    """A verdict on the requests of a session: what they add up to lies above a threshold."""

    detector: DetectorName
    stage: Literal["conversation"] = Field(description="conversation: whenever a request of the session has ended")
    of: Stage = Field(description="which statistic of each request: that at the stage prompt, stream or response")
    aggregate: AnyAggregator | None = Field(
        default=None, description="how the scores of a request become its statistic; the calibrated one if left out"
    )
    segments: tuple[Role, ...] | None = Field(
        default=None, min_length=1, description="whose tokens of the prompt are read; everybody's if left out"
    )
    accumulate: AnyAccumulator = Field(description="how the requests of a session become one number")
    above: Limit = Field(description="the threshold of that number: {value: NUMBER}")
    by: Literal[Subject.SESSION, Subject.TENANT] = Field(
        default=Subject.SESSION,
        description="whose requests belong together: session, as the client names it, or tenant",
    )

    @model_validator(mode="after")
    def _readable_segments(self) -> Self:
        _require_readable(self.segments, self.of)
        return self

    @property
    def verdict(self) -> When:
        """What is read of each request."""
        return When(detector=self.detector, stage=self.of, aggregate=self.aggregate, segments=self.segments)


_KINDS: Final[dict[str, type[Strict]]] = {"all": WhenAll, "any": WhenAny, "not": WhenNot, "weigh": WhenWeighed}
"""The key that tells a kind of condition."""
CONDITION_MODELS: Final = (When, WhenConversation, *_KINDS.values())
"""Every kind of condition."""
CONDITION_KEYS: Final = (*_KINDS, *When.model_fields)
"""Every key that a condition may have."""


def condition_model(value: object) -> type[Strict]:
    """Which kind of condition a mapping of the policy file is meant to be."""
    keys = value if isinstance(value, dict) else {}
    if keys.get("stage") == CONVERSATION:
        return WhenConversation
    return next((model for key, model in _KINDS.items() if key in keys), When)


def is_tag(part: str | int) -> bool:
    """Whether a part of an error's place is no key of the file: it says which kind of condition was read there."""
    return isinstance(part, str) and part.startswith("<")


def _tag(value: Any) -> str:
    model = type(value) if isinstance(value, Strict) else condition_model(value)
    return f"<{model.__name__}>"


Condition = Annotated[
    Annotated[When, Tag("<When>")]
    | Annotated[WhenAll, Tag("<WhenAll>")]
    | Annotated[WhenAny, Tag("<WhenAny>")]
    | Annotated[WhenNot, Tag("<WhenNot>")]
    | Annotated[WhenWeighed, Tag("<WhenWeighed>")]
    | Annotated[WhenConversation, Tag("<WhenConversation>")],
    Discriminator(_tag),
]
"""When a rule fires: one verdict, or several joined by ``all``, ``any`` and ``not``; or one on a conversation."""

for _model in (WhenAll, WhenAny, WhenNot):
    _model.model_rebuild()


class Part(NamedTuple):
    """A verdict in a condition.

    Attributes:
        path: the keys that lead to it, from the condition on.
        verdict: it.
        negated: whether an odd number of ``not`` stands around it.
    """

    path: Path
    verdict: When | WhenWeighed
    negated: bool

    @property
    def readings(self) -> tuple[tuple[Path, str], ...]:
        """Of each detector that is read: the keys that lead to its name, and the name."""
        if isinstance(self.verdict, When):
            return (((*self.path, "detector"), self.verdict.detector),)
        return tuple(
            ((*self.path, "weigh", number, "detector"), term.detector) for number, term in enumerate(self.verdict.weigh)
        )


def parts_of(when: Condition, path: Path = (), *, negated: bool = False) -> Iterator[Part]:
    """All verdicts of a condition, in the order of the file."""
    match when:
        case WhenNot():
            yield from parts_of(when.negated, (*path, "not"), negated=not negated)
        case WhenAll():
            for number, inner in enumerate(when.all):
                yield from parts_of(inner, (*path, "all", number), negated=negated)
        case WhenAny():
            for number, inner in enumerate(when.any):
                yield from parts_of(inner, (*path, "any", number), negated=negated)
        case WhenConversation():
            yield Part(path, when.verdict, negated)
        case _:
            yield Part(path, when, negated)


def known_by_prompt(when: Condition, *, negated: bool = False) -> bool:
    """Whether a condition may become true by verdicts on the prompt alone."""
    match when:
        case WhenNot():
            return known_by_prompt(when.negated, negated=not negated)
        case WhenAll() | WhenAny():
            parts = when.all if isinstance(when, WhenAll) else when.any
            found = [known_by_prompt(part, negated=negated) for part in parts]
            # What makes "all" false is what makes "any" of the opposites true.
            return all(found) if isinstance(when, WhenAll) != negated else any(found)
        case _:
            return when.stage is Stage.PROMPT


def conversations_in(when: Condition, path: Path = ()) -> Iterator[Path]:
    """The keys that lead to each verdict on a conversation."""
    match when:
        case WhenNot():
            yield from conversations_in(when.negated, (*path, "not"))
        case WhenAll():
            for number, inner in enumerate(when.all):
                yield from conversations_in(inner, (*path, "all", number))
        case WhenAny():
            for number, inner in enumerate(when.any):
                yield from conversations_in(inner, (*path, "any", number))
        case WhenConversation():
            yield path
