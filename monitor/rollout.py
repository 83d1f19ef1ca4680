"""Rules that are enforced for a share of tenants, sessions or requests: who is in. Knows no policy and no clock."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from enum import StrEnum

_BITS = 53
"""As many as a float64 holds exactly."""


class Subject(StrEnum):
    """Who is in or out as a whole."""

    TENANT = "tenant"
    """All requests of a tenant: trying again changes nothing."""
    SESSION = "session"
    """All requests of a tenant's session, by the id that the client gives it: a new one is drawn anew."""
    REQUEST = "request"
    """A request with all its choices: trying again is drawn anew."""


@dataclass(frozen=True, slots=True)
class Subjects:
    """Whom a request belongs to.

    Attributes:
        tenant: empty where nobody tells tenants apart: the whole server is one.
        session: empty where the client names none: then all such requests of the tenant are one.
        request: the same for all choices of a request.
    """

    tenant: str = ""
    session: str = ""
    request: str = ""

    def of(self, by: Subject) -> tuple[str, ...]:
        """What tells one subject from another."""
        match by:
            case Subject.TENANT:
                return (self.tenant,)
            case Subject.SESSION:
                return (self.tenant, self.session)
            case Subject.REQUEST:
                return (self.tenant, self.request)


@dataclass(frozen=True, slots=True)
class Share:
    """For whom a rule is enforced.

    Attributes:
        percent: of the subjects, 0 to 100.
        by: what a subject is.
    """

    percent: float
    by: Subject

    def holds(self, key: bytes, rule: str, subjects: Subjects) -> bool:
        """Whether a request is in.

        The same key gives the same answer, at every start and in every replica; whoever is in at one percentage is in
        at every larger one; rules are drawn apart from each other. Without the key nobody can tell who is in.

        Args:
            key: secret of the server.
            rule: its name.
            subjects: whom the request belongs to.
        """
        message = json.dumps([rule, self.by.value, *subjects.of(self.by)]).encode()
        drawn = int.from_bytes(hmac.digest(key, message, hashlib.sha256)[:8], "big") >> (64 - _BITS)
        return drawn * 100.0 < self.percent * float(2**_BITS)
