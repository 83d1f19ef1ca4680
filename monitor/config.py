"""The policy file as data: every key, its bounds and its meaning. Knows no detector and no engine."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from monitor.audit.settings import AuditSettings
from monitor.types import RESERVED_RULES, Action, Expose, Mode, Role
from probes.aggregate import AnyAggregator
from probes.card import Stage
from probes.errors import did_you_mean
from probes.steering import Operator, SteerError, operator_kinds, parse_operator
from probes.steering.steer import Positions

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$", description="lower case, digits, '-' and '_'")]
DetectorName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$", description="lower case, digits and '_'")]
Duration = Annotated[
    str, Field(pattern=r"^[0-9]{1,6}(ms|s|m|h)$", description="a whole number with its unit: 500ms, 60s, 5m, 1h")
]
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
DEFAULT_TEXT = "I can't help with that."


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DetectorEntry(_Strict):
    """What is read: a pack of detectors, or one artifact."""

    pack: str | None = Field(default=None, description="a shipped pack, e.g. builtin:smollm2-135m-instruct")
    artifact: str | None = Field(
        default=None, description="path of a .safetensors file that telltale train wrote; relative to the policy file"
    )
    name: DetectorName | None = Field(default=None, description="what to call it here; the card's name if left out")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.pack is None) == (self.artifact is None):
            raise ValueError("an entry has exactly one of 'pack' and 'artifact'")
        if self.pack is not None and self.name is not None:
            raise ValueError("'name' renames one artifact; a pack's detectors keep their names")
        return self


def _operators_in_schema(schema: dict[str, Any]) -> None:
    """Every operator, with its parameters beside the entry's own keys."""
    own = schema["properties"]
    variants = []
    for kind, cls in operator_kinds().items():
        parameters = cls.model_json_schema()
        variants.append(
            {
                "additionalProperties": False,
                "properties": {
                    **dict.fromkeys(own, True),
                    **parameters.get("properties", {}),
                    "op": {"const": kind, "description": parameters.get("description", "")},
                },
                "required": parameters.get("required", []),
            }
        )
    schema.pop("additionalProperties", None)
    schema["oneOf"] = variants


class SteerEntry(BaseModel):
    """What may be written: a direction, an operator with its parameters, and the rows.

    The operator's parameters stand beside the other keys: ``{name: calm, artifact: ..., op: cap, strength: 0.5}``.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, json_schema_extra=_operators_in_schema)

    name: Name
    artifact: str = Field(description="path of a .safetensors file with a card; relative to the policy file")
    op: str = Field(description="the operator: cap, add, ablate, ...")
    positions: Positions = Field(default=Positions.GENERATED, description="which rows: generated, prompt or all")
    max_dose: float = Field(
        default=0.5, gt=0, le=10, allow_inf_nan=False, description="largest change of a row, in median norms"
    )
    allow_safety_reducing: bool = Field(default=False, description="whether it may make the model less safe")

    @model_validator(mode="after")
    def _valid_operator(self) -> Self:
        self.operator()
        return self

    def operator(self) -> Operator:
        """The operator with its parameters.

        Raises:
            ValueError: there is no such operator, or no such parameter, or one is out of range.
        """
        given = self.model_extra or {}
        try:
            return parse_operator(self.op, given)
        except SteerError as error:
            raise ValueError(f"'op': {error}") from error
        except ValidationError as error:
            known = {*SteerEntry.model_fields, *operator_kinds()[self.op].model_fields}
            raise ValueError("; ".join(_of_operator(self.op, item, known) for item in error.errors())) from error


def _of_operator(op: str, item: Any, known: set[str]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key!r} is not a key of a steer with op: {op}. {did_you_mean(key, known)}"
    return f"{key!r}: {item['msg']} (op: {op})"


class Gate(StrEnum):
    """Which of the rows that a steer may write to are written to."""

    TOKEN = "token"  # noqa: S105 - no secret
    """Those that lie above the rule's threshold themselves."""
    LATCHED = "latched"
    """All behind the first one that made the rule fire."""


class Above(_Strict):
    """A threshold: a number, or a false-positive rate to read it from the artifact's calibration."""

    value: float | None = Field(default=None, allow_inf_nan=False, description="fires above it, strictly")
    target_fpr: float | None = Field(default=None, gt=0, lt=1, description="share of benign requests that may fire")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.value is None) == (self.target_fpr is None):
            raise ValueError("'above' has exactly one of 'value' and 'target_fpr'")
        return self


class When(_Strict):
    """The condition of a rule: one detector's statistic at one stage lies above a threshold."""

    detector: DetectorName
    stage: Stage = Field(
        description="prompt: once, before the first token; stream: at every token; response: once, when the reply ended"
    )
    aggregate: AnyAggregator | None = Field(default=None, description="the calibrated one if left out")
    above: Above | None = Field(default=None, description="the artifact's own threshold if left out")
    segments: tuple[Role, ...] | None = Field(
        default=None, min_length=1, description="whose tokens of the prompt are read; everybody's if left out"
    )

    @model_validator(mode="after")
    def _readable_segments(self) -> Self:
        named = self.segments
        if named is None:
            return self
        if doubles := sorted({role.value for role in named if named.count(role) > 1}):
            raise ValueError(f"'segments' names {doubles[0]!r} twice; name each role once")
        if self.stage is not Stage.PROMPT and Role.ASSISTANT not in named:
            raise ValueError(
                f"'segments' is {[role.value for role in named]} at the stage {self.stage.value!r}, which reads the "
                "reply: all of it counts as 'assistant', so that this rule could never fire. Use the stage 'prompt', "
                "name 'assistant' too, or leave 'segments' out."
            )
        return self


class Do(_Strict):
    """What a rule does."""

    action: Literal[Action.FLAG, Action.STEER, Action.BLOCK]
    steer: Name | None = Field(default=None, description="which steer; one of those under 'steers'")
    gate: Gate | None = Field(
        default=None,
        description="which rows are written to: latched, all behind the one that makes the rule fire; token, those "
        "that lie above the threshold themselves",
    )
    text: str | None = Field(default=None, min_length=1, max_length=4096, description="what a blocked reply says")

    @model_validator(mode="after")
    def _text_of_block(self) -> Self:
        if self.text is not None and self.action is not Action.BLOCK:
            raise ValueError("'text' is what a blocked reply says; only 'action: block' has one")
        return self

    @model_validator(mode="after")
    def _steer_of_steer(self) -> Self:
        if self.action is Action.STEER and (self.steer is None or self.gate is None):
            raise ValueError("'action: steer' also needs 'steer', the name of one, and 'gate', latched or token")
        if self.action is not Action.STEER and (self.steer is not None or self.gate is not None):
            raise ValueError("'steer' and 'gate' say how to steer; only 'action: steer' has them")
        return self


class Rule(_Strict):
    """When this, do that."""

    name: Name
    when: When
    do: Do
    mode: Mode

    @model_validator(mode="after")
    def _free_name(self) -> Self:
        if self.name in RESERVED_RULES:
            raise ValueError(f"{self.name!r} is what decisions of that policy key are called; choose another name")
        return self

    @model_validator(mode="after")
    def _possible_action(self) -> Self:
        if self.when.stage is Stage.RESPONSE and self.do.action is Action.BLOCK:
            raise ValueError(
                "blocks at the stage 'response': by then the reply has been sent. Use 'stage: stream', which stops it "
                "at the token that shows it, or 'action: flag'."
            )
        if self.when.stage is Stage.RESPONSE and self.do.action is Action.STEER:
            raise ValueError(
                "steers at the stage 'response': by then nothing is left to be written to. Use 'stage: prompt' or "
                "'stage: stream'."
            )
        return self


Answer = Literal[Action.ALLOW, Action.FLAG, Action.BLOCK]
"""What may be done where nobody knows what a request's text is like: steering needs a reason."""


class Policy(_Strict):
    """What happens to a request."""

    name: Name
    on_gap: Answer = Field(description="what to do when a position could not be scored: block, flag or allow")
    on_uncalibrated: Answer = Field(description="what to do in a format that a detector's card does not list")
    steers: tuple[Name, ...] = Field(default=(), description="steers that write to every request of this policy")
    on_request: tuple[Name, ...] = Field(
        default=(), description="steers that a request may ask for, by name and with at most their strength"
    )
    hold_back: int | None = Field(
        default=None,
        ge=0,
        le=1024,
        description="how many positions from a token on must be scored before it leaves; 0: at once. "
        "Default: 1 where a rule may block a stream",
    )
    expose: Expose = Field(default=Expose.ACTIONS, description="what a client is told")
    text: str = Field(default=DEFAULT_TEXT, min_length=1, max_length=4096, description="what a blocked reply says")
    rules: tuple[Rule, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct_rules(self) -> Self:
        names = [rule.name for rule in self.rules]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rules are named {doubles[0]!r}; metrics and replies need one name for one rule")
        for key, listed in (("steers", self.steers), ("on_request", self.on_request)):
            if doubles := sorted({name for name in listed if listed.count(name) > 1}):
                raise ValueError(f"{key!r} names {doubles[0]!r} twice; name each once")
        return self

    @model_validator(mode="after")
    def _only_clients_choose_what_clients_may_choose(self) -> Self:
        own = {*self.steers, *(rule.do.steer for rule in self.rules if rule.do.steer is not None)}
        if shared := sorted(own & set(self.on_request)):
            raise ValueError(
                f"'on_request' names {shared[0]!r}, which this policy also applies by itself: a request could ask for "
                "less of it. List a steer of its own, with the same artifact, for requests"
            )
        return self


class Reserve(_Strict):
    """Room that is set aside when the engine starts."""

    directions: int = Field(default=64, ge=1, le=4096, description="columns per tap")


class CanarySettings(_Strict):
    """How often the engine must show that it reads what it is known to read. It cannot be switched off."""

    every: Duration = Field(default="60s", description="from one round to the next: 1s to 24h")
    deadline: Duration = Field(default="10s", description="for one canary, once it is being computed: 100ms to 10m")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if not 1 <= self.every_seconds <= 24 * 3600:
            raise ValueError(f"'every' is {self.every}; it must lie between 1s and 24h")
        if not 0.1 <= self.deadline_seconds <= 600:  # noqa: PLR2004 - the bounds that the message states
            raise ValueError(f"'deadline' is {self.deadline}; it must lie between 100ms and 10m")
        return self

    @property
    def every_seconds(self) -> float:
        """``every`` in seconds."""
        return seconds_of(self.every)

    @property
    def deadline_seconds(self) -> float:
        """``deadline`` in seconds."""
        return seconds_of(self.deadline)


def seconds_of(duration: str) -> float:
    """A ``Duration`` in seconds."""
    unit = duration.lstrip("0123456789")
    return int(duration.removesuffix(unit)) * _SECONDS[unit]


class Config(_Strict):
    """A policy file."""

    version: Literal["1"]
    model: str | None = Field(
        default=None, description="the model that this file is for; another one on the command line is an error"
    )
    detectors: tuple[DetectorEntry, ...] = Field(min_length=1)
    steers: tuple[SteerEntry, ...] = Field(default=(), description="what may be written to the model")
    policies: tuple[Policy, ...] = Field(min_length=1, max_length=1, description="the policy of every request")
    audit: AuditSettings | None = Field(default=None, description="where events are written; left out: nowhere")
    canary: CanarySettings = Field(default_factory=CanarySettings)
    reserve: Reserve = Field(default_factory=Reserve)

    @model_validator(mode="after")
    def _distinct_steers(self) -> Self:
        names = [entry.name for entry in self.steers]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two steers are named {doubles[0]!r}; give one of them another name")
        return self
