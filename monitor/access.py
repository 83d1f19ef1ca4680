"""Who may ask the server for what: keys, their scopes and limits, as the policy file says them. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from monitor.strict import Name, Strict

if TYPE_CHECKING:
    from monitor.tenants import Tenant

KeyDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 of an API key: what ``telltale key new`` prints."""
PerMinute = Annotated[int, Field(ge=1, le=1_000_000)]


class KeyScope(StrEnum):
    """What a key is good for.

    ``INFER`` sends text to the model, ``OBSERVE`` reads metrics, documentation and the state of the monitor, ``ADMIN``
    changes it, and reads it too. A key with none but ``ADMIN`` sends no text.
    """

    INFER = "infer"
    OBSERVE = "observe"
    ADMIN = "admin"


class Door(StrEnum):
    """Whether a part of the server answers requests without a key."""

    OPEN = "open"
    KEYED = "keyed"


class ApiKey(Strict):
    """A key that is no tenant's."""

    name: Name
    key_sha256: KeyDigest = Field(description="SHA-256 of the API key, 64 hexadecimal digits in lower case")
    scopes: tuple[KeyScope, ...] = Field(min_length=1, description="what it is good for: infer, observe, admin")
    requests_per_minute: PerMinute | None = Field(
        default=None, description="in the place of the limit that all keys have"
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if doubles := sorted({scope.value for scope in self.scopes if self.scopes.count(scope) > 1}):
            raise ValueError(f"'scopes' names {doubles[0]!r} twice; name each once")
        return self


class Access(Strict):
    """Who gets an answer, and how much a request may be."""

    keys: tuple[ApiKey, ...] = Field(default=(), description="keys besides those of tenants")
    inference: Door | None = Field(
        default=None,
        description="open: requests without a key reach the model, wherever the server listens. Default: keyed where "
        "there is a key for it; else open on the loopback address, and no start anywhere else",
    )
    metrics: Door | None = Field(
        default=None,
        description="whether /metrics needs a key with the scope observe. Default: not on the loopback address, for "
        "requests that no proxy passed on",
    )
    requests_per_minute: PerMinute | None = Field(
        default=None, description="of each key, and of all requests without one together; no limit if left out"
    )
    body_bytes: int = Field(
        default=64 << 20, ge=1024, le=1 << 30, description="largest body of a request, counted while it is read"
    )
    header_bytes: int = Field(
        default=32 << 10, ge=1024, le=1 << 20, description="largest sum of a request's header names and values"
    )

    def require_sound(self, tenants: Iterable[Tenant]) -> None:
        """See that each key has one meaning.

        Raises:
            ValueError: two keys have one name or one digest, or nobody could tell whose policy a key gives.
        """
        tenants = tuple(tenants)
        digests = [key.key_sha256 for key in self.keys]
        for what, values in (("named", [key.name for key in self.keys]), ("told by the key", digests)):
            if doubles := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"'access': two keys are {what} {doubles[0]!r}; name each once")
        if shared := sorted({tenant.key_sha256 for tenant in tenants} & set(digests)):
            raise ValueError(f"'access': the key {shared[0]!r} is also a tenant's; give it one entry")
        senders = [key.name for key in self.keys if KeyScope.INFER in key.scopes]
        if tenants and senders:
            raise ValueError(
                f"'access': the key {senders[0]!r} may 'infer' and is no tenant's, so that nothing says its policy. "
                "Write it into 'tenants'"
            )
        if self.inference is Door.OPEN and (tenants or senders):
            raise ValueError("'access': 'inference' is open, and there are keys for it. Leave out one of the two")
