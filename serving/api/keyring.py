"""Who holds which key, and what it is good for. Holds digests alone; knows no HTTP."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

from monitor.access import KeyScope
from monitor.config import Config

KEY_PREFIX = "tt-"
"""By which programs that look for lost secrets know ours."""
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Holder:
    """Whoever holds a key.

    Attributes:
        digest: SHA-256 of the key, 64 hexadecimal digits.
        scopes: what it is good for.
        requests_per_minute: that it may send; None for the limit that all have.
    """

    digest: str = field(repr=False)
    scopes: frozenset[KeyScope]
    requests_per_minute: int | None = None


class KeyRing:
    """All keys of a server.

    Args:
        holders: of them.
    """

    def __init__(self, holders: Iterable[Holder] = ()) -> None:
        self._holders = tuple(holders)

    def holder_of(self, key: str) -> Holder | None:
        """Who holds a key. Takes as long whichever key it is, and whether there is one."""
        digest, found = digest_of(key), None
        for holder in self._holders:
            if hmac.compare_digest(holder.digest, digest):
                found = holder
        return found if key else None

    @property
    def digests(self) -> tuple[str, ...]:
        """Of all keys."""
        return tuple(holder.digest for holder in self._holders)

    def has(self, scope: KeyScope) -> bool:
        """Whether some key is good for this."""
        return any(scope in holder.scopes for holder in self._holders)

    def with_admin(self, digest: str | None) -> KeyRing:
        """The same, and a key that observes and administers; None adds nothing."""
        if digest is None:
            return self
        return KeyRing([*self._holders, Holder(digest, frozenset({KeyScope.OBSERVE, KeyScope.ADMIN}))])


def key_ring(config: Config, senders: Iterable[str] = ()) -> KeyRing:
    """The keys of a policy file, and others.

    Args:
        config: the policy file.
        senders: digests of keys that may ``infer``, and stand in no file.
    """
    infer = frozenset({KeyScope.INFER})
    tenants = [Holder(tenant.key_sha256, infer, tenant.requests_per_minute) for tenant in config.tenants]
    keys = [Holder(key.key_sha256, frozenset(key.scopes), key.requests_per_minute) for key in config.access.keys]
    known = {holder.digest for holder in (*tenants, *keys)}
    return KeyRing(
        [*tenants, *keys, *(Holder(digest, infer) for digest in dict.fromkeys(senders) if digest not in known)]
    )


def new_key() -> str:
    """A key of 256 random bits: nobody guesses it, so that a plain digest of it is enough."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(key: str) -> str:
    """SHA-256 of a key, 64 hexadecimal digits."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
