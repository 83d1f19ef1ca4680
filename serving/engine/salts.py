"""The salt of a request's KV blocks: what is cached for one tenant is found by no other."""

from __future__ import annotations

import hashlib
import json


def salt_of(tenant: str, given: str | None) -> str | None:
    """The salt of a tenant's request.

    Args:
        tenant: whose it is; empty where nobody tells.
        given: by the client, for a protection of its own within the tenant's.
    Returns: no client can make another tenant's; the given one where nobody tells tenants apart.
    """
    if not tenant:
        return given
    return hashlib.sha256(json.dumps(["telltale-tenant", tenant, given]).encode()).hexdigest()
