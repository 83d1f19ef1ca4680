"""The policy file as data: every key, its bounds and its meaning. Knows no detector and no engine."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from monitor.access import Access
from monitor.audit.settings import AuditSettings, TextKept
from monitor.duration import Duration, seconds_of
from monitor.entries import DetectorEntry, SteerEntry
from monitor.explain import ExplainSettings
from monitor.probing import ProbingSettings
from monitor.rule import Rule
from monitor.sessions.settings import SessionSettings
from monitor.sinks.settings import SinkEntry, require_distinct
from monitor.strict import Name, Strict
from monitor.tenants import Tenant
from monitor.types import STRICTEST, Action, Expose

DEFAULT_TEXT = "I can't help with that."


Answer = Literal[Action.ALLOW, Action.FLAG, Action.BLOCK]
"""What may be done where nobody knows what a request's text is like: steering needs a reason."""


class Policy(Strict):
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
    quantise: float = Field(
        default=0.5,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="scores that clients are told are rounded to a multiple of this, in the detector's own units; 0: "
        "told to four digits, which is enough to climb to a threshold from below",
    )
    probing: ProbingSettings | None = Field(
        default=None, description="whether to tell of tenants whose requests lie near a threshold too often"
    )
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


class Reserve(Strict):
    """Room that is set aside when the engine starts."""

    directions: int = Field(default=64, ge=1, le=4096, description="columns per tap")


class CanarySettings(Strict):
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


class Config(Strict):
    """A policy file."""

    version: Literal["1"]
    model: str | None = Field(
        default=None, description="the model that this file is for; another one on the command line is an error"
    )
    detectors: tuple[DetectorEntry, ...] = Field(min_length=1)
    steers: tuple[SteerEntry, ...] = Field(default=(), description="what may be written to the model")
    policies: tuple[Policy, ...] = Field(
        min_length=1, description="what happens to requests; the first is everybody's whose tenant names no other"
    )
    tenants: tuple[Tenant, ...] = Field(
        default=(), description="who holds which API key, and which policy that gives; without a known key: no answer"
    )
    access: Access = Field(default_factory=Access, description="who gets an answer, and how much a request may be")
    audit: AuditSettings | None = Field(default=None, description="where events are written; left out: nowhere")
    sessions: SessionSettings = Field(
        default_factory=SessionSettings, description="what is remembered of conversations"
    )
    sinks: tuple[SinkEntry, ...] = Field(default=(), description="webhooks that events are sent to")
    explain: ExplainSettings | None = Field(
        default=None, description="which latents were active where a rule fired; left out: nothing is explained"
    )
    canary: CanarySettings = Field(default_factory=CanarySettings)
    reserve: Reserve = Field(default_factory=Reserve)

    @model_validator(mode="after")
    def _explanations_go_somewhere(self) -> Self:
        if self.explain is not None and self.audit is None:
            raise ValueError(
                "'explain' needs 'audit': explanations are events of the audit trail. Add 'audit: {}', or leave "
                "'explain' out"
            )
        return self

    @model_validator(mode="after")
    def _distinct_policies(self) -> Self:
        names = [policy.name for policy in self.policies]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two policies are named {doubles[0]!r}; metrics and tenants need one name for one policy")
        if STRICTEST in names:
            raise ValueError(f"{STRICTEST!r} is what the policy of requests without our signature is called")
        return self

    @model_validator(mode="after")
    def _distinct_tenants(self) -> Self:
        for what, values in (
            ("named", [tenant.name for tenant in self.tenants]),
            ("told by the key", [tenant.key_sha256 for tenant in self.tenants]),
        ):
            if doubles := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"two tenants are {what} {doubles[0]!r}; nobody could tell them apart")
        return self

    @model_validator(mode="after")
    def _fitting_sinks(self) -> Self:
        require_distinct(self.sinks)
        texts = self.audit is not None and self.audit.text is not TextKept.NONE
        if not texts and (wrong := [sink.name for sink in self.sinks if sink.text]):
            raise ValueError(
                f"the sink {wrong[0]!r} is to get texts as the audit trail keeps them, and it keeps none. Say which: "
                "audit: {text: flagged}"
            )
        return self

    @model_validator(mode="after")
    def _one_meaning_for_each_key(self) -> Self:
        self.access.require_sound(self.tenants)
        return self

    @model_validator(mode="after")
    def _distinct_steers(self) -> Self:
        names = [entry.name for entry in self.steers]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two steers are named {doubles[0]!r}; give one of them another name")
        return self
