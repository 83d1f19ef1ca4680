"""Events: what is written down of a decision, and of what else an auditor must know. Knows no store and no engine.

An event holds nothing by which a person could be found: that is its ``Content``, which can be erased without a trace
in the event.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, Literal, Self
from uuid import UUID, uuid4

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

from monitor.canary import CanaryFailure
from monitor.outcome import Outcome
from monitor.types import Action, Gap, Mode, PromptEvent, ReloadOutcome, ReloadSource, Role, Skip
from probes.card import Format, Stage

Count = Annotated[int, Field(ge=0)]


def _whole(text: str) -> str:
    """With U+FFFD for halves of surrogate pairs: a client's JSON may hold them, ours may not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


Said = Annotated[str, AfterValidator(_whole)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Verdict(_Strict):
    """What one detector said of a request at one stage."""

    detector: str
    stage: Stage
    aggregate: str = Field(description="how token scores became the statistic, with its parameters")
    segments: tuple[Role, ...] | None = Field(default=None, description="the roles that it read; null: everything")
    statistic: float | None = Field(description="the number that is judged; null where it was never defined")
    threshold: float | None = Field(description="it fires above it, strictly; null: not calibrated for this format")
    fired: bool
    fired_at: int | None = Field(default=None, ge=0, description="newest position when it fired, from 0")


class ActedRule(_Strict):
    """A rule, ``on_gap`` or ``on_uncalibrated``, that fired on a request."""

    name: str
    action: Action
    mode: Mode = Field(description="shadow: what it would have done")


class SteerRecord(_Strict):
    """What one steer wrote to a request, in units of the stream's median norm."""

    name: str
    tokens: Count
    mean: float | None = Field(description="over the tokens that it changed; null: not finite")
    largest: float | None = Field(description="likewise")


class CoverageRecord(_Strict):
    """The account of a request's positions: ``scored + skipped + gaps = positions``."""

    positions: Count
    scored: Count
    skipped: dict[Skip, Count] = Field(default_factory=dict, description="rightly not scored, by reason")
    gaps: dict[Gap, Count] = Field(default_factory=dict, description="should have been scored and were not, by reason")


class Head(_Strict):
    """The newest record of a chain at some moment."""

    writer: str
    seq: Count
    mac: str


class Reference(_Strict):
    """One record."""

    writer: str
    seq: Count


class _Event(_Strict):
    version: Literal["1"] = "1"
    id: UUID = Field(default_factory=uuid4)
    time: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC), description="UTC, by the writer's clock")

    @cached_property
    def spelled(self) -> str:
        """It in the one spelling; made once, however many outlets it goes to."""
        return canonical(self)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, which would take the spelling of this one along."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("spelled", None)
        return copied


class Decision(_Event):
    """A request has ended: what was seen of it and what was done."""

    kind: Literal["decision"] = "decision"
    plan: str = Field(description="digest of the policy file with its detectors and steers")
    policy: str
    artifacts: dict[str, str] = Field(description="SHA-256 of the tensors of each detector that the policy reads")
    format: Format
    action: Action = Field(description="the most severe that was enforced")
    rule: str | None = Field(description="what decided it; null: nothing did, it was allowed")
    rules: tuple[ActedRule, ...] = Field(description="all that fired, in shadow too")
    verdicts: tuple[Verdict, ...]
    coverage: CoverageRecord
    noticed: tuple[PromptEvent, ...] = Field(default=(), description="while the prompt was made of messages")
    steers: tuple[SteerRecord, ...] = ()
    prompt_tokens: Count | None = Field(default=None, description="null: it never came back to the API process")
    reply_tokens: Count | None = None
    finish_reason: str | None = Field(default=None, description="as the client was told")


class Handled(_Event):
    """A rule that withholds was carried out behind the engine: what came of it."""

    kind: Literal["handled"] = "handled"
    plan: str
    policy: str
    rule: str
    action: Action
    outcome: Outcome


class ConversationFired(_Event):
    """A request has ended with which a rule over conversations fired; it stands against the session from now on."""

    kind: Literal["conversation"] = "conversation"
    plan: str
    policy: str
    rule: str
    action: Action = Field(description="what is done about the session's next requests")
    mode: Mode = Field(description="shadow: what would be done")
    detector: str
    accumulator: str = Field(description="how requests became the value, with its parameters")
    value: float = Field(description="it was above the threshold")
    threshold: float
    requests: Annotated[int, Field(ge=1, description="of the session, this one included")]
    until: AwareDatetime | None = Field(description="it stands; null: until the session ends")


class ProbingSuspected(_Event):
    """A tenant's requests lie near a threshold more often than benign ones would. Nothing is done about it."""

    kind: Literal["probing"] = "probing"
    plan: str
    policy: str
    detector: str
    stage: Stage
    requests: Annotated[int, Field(ge=1, description="of the tenant, since there was no sign of it")]
    near: Annotated[int, Field(ge=1, description="of these, those that lay near the threshold")]
    benign: float = Field(description="at most such a share of benign requests lies there")


class LatentSeen(_Strict):
    """A latent at a token."""

    latent: Count
    activity: float = Field(description="its code")
    part: float | None = Field(description="of the detector's score; null: the detector is no direction at this tap")


class TokenExplained(_Strict):
    """A token that was read when a rule fired."""

    position: Count
    score: float | None = Field(description="of the detector")
    active: Count = Field(description="latents that were active, told or not")
    rest: float | None = Field(
        description="of the score, what no latent gives: constants, and what is not reconstructed"
    )
    latents: tuple[LatentSeen, ...] = Field(description="the largest first")


class Explanation(_Event):
    """Which latents of a sparse autoencoder were active where a rule fired. Read anew once the request had ended."""

    kind: Literal["explanation"] = "explanation"
    plan: str
    decision: UUID = Field(description="the event of the request that is explained")
    rule: str
    detector: str
    stage: Stage
    sae: str
    sae_digest: str = Field(description="SHA-256 of its tensors: a latent's number means nothing without it")
    tap: str
    steered: bool = Field(description="the request was written to; this is what was read without")
    tokens: tuple[TokenExplained, ...] = Field(description="those with the highest scores, by position")


class GapSeen(_Event):
    """An engine step left positions unscored that should have been scored."""

    kind: Literal["gap"] = "gap"
    plan: str
    gaps: dict[Gap, Count]


class CanaryFailed(_Event):
    """A round of canaries did not pass: from here on nothing that was read can be relied on."""

    kind: Literal["canary"] = "canary"
    plan: str
    reason: CanaryFailure
    detail: str


class PolicyReloaded(_Event):
    """Another policy was to be put in force while the server ran."""

    kind: Literal["policy"] = "policy"
    plan: str | None = Field(description="digest of the new one; null: it never became a plan")
    before: str = Field(description="digest of the one that ran until then, and still runs unless it was applied")
    source: ReloadSource
    outcome: ReloadOutcome
    setting: str | None = Field(default=None, description="what is fixed at the start, where a restart is needed")


class Started(_Event):
    """A writer has begun its chain."""

    kind: Literal["started"] = "started"
    program: str = Field(description="version of telltale")
    plan: str | None = Field(default=None, description="null: a command wrote, no server")
    model: str | None = None
    model_digest: str | None = Field(default=None, description="SHA-256 over the weights")
    policies: tuple[str, ...] = ()
    artifacts: dict[str, str] = Field(default_factory=dict, description="SHA-256 of each detector's tensors")
    text: str | None = Field(default=None, description="which texts are kept")
    durability: str | None = None
    heads: tuple[Head, ...] = Field(default=(), description="ends of the newest other chains in the store")


class Stopped(_Event):
    """A writer has ended its chain by itself. A chain without it was cut off: a crash, or a machine that went down."""

    kind: Literal["stopped"] = "stopped"


class Dropped(_Event):
    """Events were not written."""

    kind: Literal["dropped"] = "dropped"
    count: Annotated[int, Field(ge=1)]
    reason: Literal["queue_full"] = "queue_full"


class Erased(_Event):
    """The contents of records were erased on demand; the records themselves stand."""

    kind: Literal["erased"] = "erased"
    by: Literal["request", "tenant"]
    records: tuple[Reference, ...]


class PrunedChain(_Strict):
    """Where a chain begins now."""

    writer: str
    below: Annotated[int, Field(ge=1, description="first sequence number that was kept")]
    mac: str = Field(description="of the record before it")


class Pruned(_Event):
    """The oldest records were removed because their time was over."""

    kind: Literal["pruned"] = "pruned"
    before: AwareDatetime = Field(description="whatever is older may be gone")
    chains: tuple[PrunedChain, ...] = Field(description="all that do not begin with their first record any more")


Event = (
    Decision
    | Explanation
    | ConversationFired
    | Handled
    | ProbingSuspected
    | GapSeen
    | CanaryFailed
    | PolicyReloaded
    | Started
    | Stopped
    | Dropped
    | Erased
    | Pruned
)
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class Content(_Strict):
    """Whose request it was and, as the policy allows, what was said. Stored beside the event, and erasable."""

    request_id: Said = Field(description="the engine's own, unique id")
    client_request_id: Said | None = Field(default=None, description="as the client knows it; clients may choose it")
    tenant: str | None = None
    prompt: Said | None = Field(default=None, description="as the model read it, template and all")
    reply: Said | None = Field(default=None, description="as the model wrote it, before any refusal took its place")
    tokens: tuple[Said, ...] | None = Field(default=None, description="of an explanation, in its order")
    withheld: str | None = Field(default=None, description="why texts that should stand here do not")


def canonical(model: BaseModel) -> str:
    """The one spelling of an event or a content: JSON in ASCII, keys sorted, no spaces. This is what is signed."""
    return json.dumps(
        model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def parse_event(text: str) -> Event:
    """Undo ``canonical``.

    Raises:
        pydantic.ValidationError: it is no event of this version.
    """
    return _EVENT.validate_json(text)


def parse_content(text: str) -> Content:
    """Undo ``canonical``.

    Raises:
        pydantic.ValidationError: it is no content.
    """
    return Content.model_validate_json(text)
