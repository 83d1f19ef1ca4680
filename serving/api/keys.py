"""All keys of a server process, from where each of them is said."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping

from monitor.access import KeyScope
from monitor.config import Config
from probes.statedir import user_state_dir
from serving.api.admin_key import read_admin_digest
from serving.api.binding import AccessError
from serving.api.keyring import KeyRing, digest_of, key_ring

VLLM_VARIABLE = "VLLM_API_KEY"
DIGEST_VARIABLE = "TELLTALE_API_KEY_SHA256"
"""The digest of what was in ``VLLM_API_KEY``, for the processes that answer requests."""


def take_key_away(environment: MutableMapping[str, str] = os.environ) -> None:
    """Put the digest of the environment's key in its place.

    vLLM's own guard, which asks for that key alone and on some paths only, then has nothing to do.
    """
    key = environment.pop(VLLM_VARIABLE, "")
    if key:
        environment[DIGEST_VARIABLE] = digest_of(key)


def sender_digests(given: Iterable[str] = (), environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Digests of the keys that may ``infer`` and stand in no file.

    Args:
        given: on the command line, in clear.
        environment: of this process.
    """
    # As vLLM reads them: the command line comes before the environment.
    keys = [key for key in given if key] or [environment.get(VLLM_VARIABLE, "")]
    found = [digest_of(key) for key in keys if key]
    handed = environment.get(DIGEST_VARIABLE)
    return tuple(dict.fromkeys([*found, *([handed] if handed else [])]))


def ring_of(config: Config, senders: Iterable[str] = ()) -> KeyRing:
    """All keys of a server: those of its policy file, those given otherwise, and the administrator's that was made.

    Args:
        config: the policy file.
        senders: digests of keys that may ``infer`` and stand in no file.
    Raises:
        AccessError: there are tenants, and a key of which nothing says whose it is.
        serving.api.admin_key.AdminKeyError: the digest of the administrator's key is not to be trusted.
    """
    senders = tuple(senders)
    if config.tenants and set(senders) - {tenant.key_sha256 for tenant in config.tenants}:
        raise AccessError(
            f"the policy file has tenants, and {VLLM_VARIABLE} or --api-key another key, of which nothing says whose "
            "it is. Leave it out, or write it into 'tenants'."
        )
    ring = key_ring(config, senders)
    return ring if ring.has(KeyScope.ADMIN) else ring.with_admin(read_admin_digest(user_state_dir()))
