"""The ``audit`` section of the policy file. Plain data: the scheduler reads it too, and knows no database."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_URL = "sqlite:///telltale.db"
Days = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}d$", description="a whole number of days: 90d")]
_FILE_SCHEMES = ("sqlite:///", "jsonl:///")
_SERVER_SCHEMES = ("postgresql://", "postgresql+psycopg://")


class TextKept(StrEnum):
    """Which texts of prompts and replies are stored."""

    NONE = "none"
    FLAGGED = "flagged"
    """Of requests on which a rule acted with more than allow, or would have in shadow."""
    REDACTED = "redacted"
    """Of all, behind the redaction hook; if it fails, none of that request."""
    FULL = "full"


class Durability(StrEnum):
    """When a response may leave."""

    BEFORE_RELEASE = "before_release"
    """Its last byte leaves when its event is on stable storage."""
    ASYNC = "async"
    """At once; events follow. A crash may lose the newest."""


class OnFull(StrEnum):
    """What happens when more events wait than the queue may hold."""

    BLOCK = "block"
    """No new request is taken in until there is room."""
    DROP = "drop"
    """Further events are not written; how many is an event."""


class OnError(StrEnum):
    """What happens while the store cannot be written."""

    BLOCK = "block"
    """Responses whose events are not stored are withheld, and new requests are refused."""
    ALLOW = "allow"
    """Traffic goes on; events wait in the queue, and are dropped and counted when it is full."""


class AuditSettings(BaseModel):
    """Where events are written, and what that may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    url: str = Field(
        default=DEFAULT_URL,
        description="sqlite:///FILE, postgresql://USER@HOST/DATABASE or jsonl:///FOLDER; paths are relative to the "
        "policy file, with a fourth slash absolute",
    )
    text: TextKept = Field(default=TextKept.NONE, description="texts that are kept: none, flagged, redacted or full")
    redact: str = Field(
        default="monitor.audit.redaction:personal_data",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="the hook of 'text: redacted', MODULE:FUNCTION, which takes a text and returns what may be kept",
    )
    durability: Durability = Field(
        default=Durability.BEFORE_RELEASE, description="whether a response waits for its event: before_release or async"
    )
    queue: int = Field(default=4096, ge=16, le=1_000_000, description="events that may wait to be written")
    on_full: OnFull = Field(default=OnFull.BLOCK, description="what happens when the queue is full: block or drop")
    on_error: OnError | None = Field(
        default=None,
        description="what happens while the store cannot be written: block or allow. Default: block with "
        "before_release, allow with async",
    )
    retention: Days | None = Field(
        default=None, description="a whole number of days, 90d, after which records are removed; default: none are"
    )
    key_file: str | None = Field(
        default=None,
        description="file of the HMAC key, made when it is missing; default: audit.key beside the policy file. "
        "TELLTALE_AUDIT_KEY in the environment (64 hexadecimal digits) goes before it",
    )
    checkpoints: str | None = Field(
        default=None, description="file to which the ends of the chains are written from time to time; default: none"
    )

    @model_validator(mode="after")
    def _known_scheme(self) -> Self:
        if not self.url.startswith((*_FILE_SCHEMES, *_SERVER_SCHEMES)):
            raise ValueError(
                f"'url' begins with {self.url.partition(':')[0]!r}; it must begin with sqlite:///, jsonl:/// or "
                "postgresql://"
            )
        return self

    @model_validator(mode="after")
    def _keeps_what_it_promises(self) -> Self:
        if self.durability is Durability.BEFORE_RELEASE and self.on_full is OnFull.DROP:
            raise ValueError(
                "'on_full: drop' loses events, and 'durability: before_release' promises each. Use 'on_full: block', "
                "or 'durability: async'"
            )
        return self

    @property
    def blocks_on_error(self) -> bool:
        """Whether nothing is released while the store cannot be written."""
        if self.on_error is None:
            return self.durability is Durability.BEFORE_RELEASE
        return self.on_error is OnError.BLOCK

    @property
    def retention_days(self) -> int | None:
        """``retention`` in days."""
        return int(self.retention.removesuffix("d")) if self.retention is not None else None

    def resolved(self, folder: Path) -> Self:
        """The same with every path absolute.

        Args:
            folder: of the policy file.
        """
        url = self.url
        for scheme in _FILE_SCHEMES:
            if url.startswith(scheme):
                url = scheme + str((folder / url.removeprefix(scheme)).absolute())
        files = {
            "key_file": str((folder / (self.key_file or "audit.key")).absolute()),
            "checkpoints": str((folder / self.checkpoints).absolute()) if self.checkpoints is not None else None,
        }
        return self.model_copy(update={"url": url, **files})
