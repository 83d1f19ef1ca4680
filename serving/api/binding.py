"""Where a server listens, and whether it may do so without keys."""

from __future__ import annotations

import ipaddress

from monitor.access import Access, Door, KeyScope
from probes.errors import TelltaleError
from serving.api.keyring import KeyRing


class AccessError(TelltaleError, ValueError):
    """The server would let in whom nobody has asked in, or nobody at all."""


def is_local(host: str | None, uds: str | None = None) -> bool:
    """Whether only this machine reaches a server.

    Args:
        host: address or name that it listens on; None or empty for all addresses.
        uds: path of a Unix socket that it listens on instead.
    """
    if uds:
        return True
    if not host:
        return False
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # another name: nobody knows what it will be resolved to
        return False


def require_keys(access: Access, ring: KeyRing, *, host: str | None, uds: str | None = None) -> None:
    """Refuse a server that answers everybody, unless its policy file says that it should.

    Args:
        access: of the policy file.
        ring: all keys.
        host: address that it listens on.
        uds: Unix socket that it listens on instead.
    Raises:
        AccessError: it would be reached from elsewhere without a key, or is keyed and has none.
    """
    if ring.has(KeyScope.INFER) or access.inference is Door.OPEN:
        return
    remedy = (
        "Make a key with telltale key new --scope infer and write its digest under 'access' or 'tenants' in the policy "
        "file, or put a key into the environment variable VLLM_API_KEY"
    )
    if access.inference is Door.KEYED:
        raise AccessError(f"'access' says 'inference: keyed', and there is no key for it. {remedy}.")
    if not is_local(host, uds):
        raise AccessError(
            f"the server would listen on {host or 'all addresses'} and answer whoever reaches it: it has no keys. "
            f"{remedy}; or say that everybody may ask: 'access: {{inference: open}}'. Or listen on 127.0.0.1."
        )
