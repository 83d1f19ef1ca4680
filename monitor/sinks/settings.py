"""The ``sinks`` section of the policy file. Plain data: the scheduler reads it too, and knows no network."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from monitor.strict import Name, Strict
from monitor.types import Action

DEFAULT_DEAD_LETTERS = "dead-letters.jsonl"
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$", description="name of an environment variable")]


class SinkKind(StrEnum):
    """What the receiver understands."""

    WEBHOOK = "webhook"
    """Our JSON, signed as Standard Webhooks 1.0 says."""
    SLACK = "slack"
    """``{"text": ...}``: Slack's incoming webhooks, Mattermost's, Rocket.Chat's, and Discord's under /slack."""


class SinkEvent(StrEnum):
    """Events that a sink may be told of, by the ``kind`` of ``monitor.events``."""

    DECISION = "decision"
    HANDLED = "handled"
    """A reply was withheld: what came of it."""
    CONVERSATION = "conversation"
    """A rule over conversations fired."""
    PROBING = "probing"
    """Somebody seems to look for a threshold."""
    GAP = "gap"
    CANARY = "canary"
    POLICY = "policy"
    """Another policy was to be put in force while the server ran."""


class SinkEntry(Strict):
    """Where events are sent to, which, and how hard it is tried."""

    name: Name
    kind: SinkKind
    url: str | None = Field(default=None, description="where to; https, or http on this machine")
    url_env: EnvironmentName | None = Field(
        default=None, description="environment variable with the URL, where the URL is a secret itself, as Slack's are"
    )
    secret_env: EnvironmentName | None = Field(
        default=None,
        description="environment variable with the secret that webhooks are signed with: whsec_ and 24 to 64 bytes in "
        "base64",
    )
    events: tuple[SinkEvent, ...] = Field(
        default=tuple(SinkEvent),
        min_length=1,
        description="which kinds of events are sent; all if left out",
    )
    min_action: Action = Field(default=Action.FLAG, description="decisions with a less severe action are not sent")
    shadow: bool = Field(default=False, description="whether what rules in shadow would have done counts as well")
    rules: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="decisions are sent only if one of these rules fired"
    )
    detectors: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="decisions are sent only if one of these detectors fired"
    )
    text: bool = Field(
        default=False, description="whether texts that the audit trail keeps, as it keeps them, are sent too"
    )
    tries: int = Field(default=8, ge=1, le=20, description="attempts, before a message becomes a dead letter")
    timeout_seconds: float = Field(default=5.0, ge=0.1, le=60, description="of one attempt, for each of its steps")
    queue: int = Field(default=1024, ge=16, le=100_000, description="messages that may wait; further ones are dropped")
    dead_letters: str = Field(
        default=DEFAULT_DEAD_LETTERS,
        min_length=1,
        description="file for messages that could not be delivered; relative to the policy file",
    )
    ca_file: str | None = Field(
        default=None,
        description="PEM file of the authorities that may vouch for the receiver, in the place of the system's; "
        "relative to the policy file",
    )

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        if (self.url is None) == (self.url_env is None):
            raise ValueError("a sink has exactly one of 'url' and 'url_env'")
        if self.kind is SinkKind.SLACK and self.url_env is None:
            raise ValueError("a Slack URL lets whoever knows it write: name its environment variable in 'url_env'")
        if self.url is not None:
            require_url(self.url)
        return self

    @model_validator(mode="after")
    def _signed(self) -> Self:
        if (self.kind is SinkKind.WEBHOOK) != (self.secret_env is not None):
            raise ValueError("'secret_env' belongs to kind: webhook, which needs it; Slack checks no signature")
        return self

    @model_validator(mode="after")
    def _filters_of_decisions(self) -> Self:
        given = [key for key in ("min_action", "shadow", "rules", "detectors") if key in self.model_fields_set]
        if given and SinkEvent.DECISION not in self.events:
            raise ValueError(f"{given[0]!r} chooses among decisions, and 'events' does not name 'decision'")
        return self

    def resolved(self, folder: Path) -> Self:
        """The same with every path absolute.

        Args:
            folder: of the policy file.
        """
        ca_file = str((folder / self.ca_file).absolute()) if self.ca_file is not None else None
        return self.model_copy(
            update={"dead_letters": str((folder / self.dead_letters).absolute()), "ca_file": ca_file}
        )


def require_url(url: str) -> None:
    """Refuse a URL that events may not go to. The message does not repeat it: it may be a secret.

    Raises:
        ValueError: it is no URL of HTTPS, nor of HTTP on this machine, or has a user or a fragment in it.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"the URL cannot be read ({error}); it must look like https://HOST/PATH") from error
    if parts.scheme not in {"http", "https"} or not host:
        raise ValueError("the URL must look like https://HOST/PATH")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError("the URL has a user, a password or a fragment in it; leave them out")
    if parts.scheme == "http" and not _is_here(host):
        raise ValueError("the URL is http, which anybody on the way can read; use https, or a receiver on this machine")


def require_distinct(entries: Iterable[SinkEntry]) -> None:
    """Refuse two sinks of one name.

    Raises:
        ValueError: there are two.
    """
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise ValueError(f"two sinks are named {entry.name!r}; metrics and dead letters need one name for one sink")
        seen.add(entry.name)


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
