"""Who sends a request, and which policy that gives: told by its API key, its headers and its model. Knows no engine."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus

from starlette.datastructures import Headers

from monitor.tenants import CompiledTenant
from probes.errors import TelltaleError, did_you_mean
from serving.api.paths import is_for_tenants
from serving.origin import Caller

SESSION_HEADER = "x-telltale-session"
"""What a client calls its session."""
POLICY_HEADER = "x-telltale-policy"
"""The policy that a trusted proxy asks for."""
TENANT_HEADER = "x-telltale-tenant"
"""Whom a trusted proxy sends a request for."""


class RefusedCallerError(TelltaleError, ValueError):
    """A request that gets no answer.

    Args:
        status: of what is answered instead.
        code: why, for programs.
        param: what is wrong; None if something is missing.
        message: why, for people.
    """

    def __init__(self, status: HTTPStatus, code: str, param: str | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class Callers:
    """Tells who is behind a request.

    Where the policy file has no tenants, an API key counts only if the server knows it: else whoever sends a request
    could make one up, and be another tenant each time.
    """

    def __init__(self) -> None:
        self._tenants: Mapping[str, CompiledTenant] = {}
        self._keys: frozenset[str] = frozenset()

    def accept(self, tenants: Mapping[str, CompiledTenant], keys: Iterable[str] = ()) -> None:
        """Before the first request: whom to know.

        Args:
            tenants: by the SHA-256 of their API keys; if there are any, nobody else gets an answer of the model.
            keys: the SHA-256 of all keys that the server knows.
        """
        self._tenants = tenants
        self._keys = frozenset(keys)

    @property
    def ask_for_keys(self) -> bool:
        """Whether only those who have a key get an answer."""
        return bool(self._tenants)

    def identify(self, path: str, headers: Headers, body: bytes) -> Caller:
        """Who sends a request.

        Args:
            path: of the route.
            headers: of the request.
            body: of it.
        Raises:
            RefusedCallerError: it has no known key, or asks for what its key does not give.
        """
        key = key_of(headers)
        named = headers.get(SESSION_HEADER, "")
        session = _digest(named) if named else ""
        if self._tenants and is_for_tenants(path):
            tenant = self._tenant_of(key)
            asked = self._by_header(tenant, headers)
            return Caller(
                tenant=f"{tenant.name}/{_digest(behind)}" if (behind := headers.get(TENANT_HEADER)) else tenant.name,
                session=session,
                policy=asked or _by_model(tenant, body),
            )
        digest = _digest(key)
        return Caller(tenant=f"key:{digest}" if digest in self._keys else "", session=session)

    def _tenant_of(self, key: str) -> CompiledTenant:
        digest, found = _digest(key), None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None or not key:
            raise RefusedCallerError(
                HTTPStatus.UNAUTHORIZED,
                "invalid_api_key",
                None,
                "this server answers requests with one of its API keys. Send yours as 'Authorization: Bearer KEY'.",
            )
        return found

    @staticmethod
    def _by_header(tenant: CompiledTenant, headers: Headers) -> str | None:
        asked = headers.get(POLICY_HEADER)
        for header in (POLICY_HEADER, TENANT_HEADER):
            if header in headers and not tenant.by_header:
                raise RefusedCallerError(
                    HTTPStatus.FORBIDDEN,
                    "header_refused",
                    header,
                    f"the header {header!r} is for trusted proxies, and this API key is none of theirs. Leave it out.",
                )
        if asked is None:
            return None
        if asked not in tenant.by_header:
            raise RefusedCallerError(
                HTTPStatus.FORBIDDEN,
                "policy_refused",
                POLICY_HEADER,
                f"the header {POLICY_HEADER!r} is {asked!r}. {did_you_mean(asked, tenant.by_header)}",
            )
        return tenant.by_header[asked]


def _by_model(tenant: CompiledTenant, body: bytes) -> str:
    if tenant.by_model is None:
        return tenant.policy
    try:
        content = json.loads(body) if body else {}
    except (ValueError, RecursionError):  # vLLM answers what is no JSON
        return tenant.policy
    model = content.get("model") if isinstance(content, dict) else None
    if not model:  # vLLM takes its own name for it
        return tenant.policy
    if not isinstance(model, str) or model not in tenant.by_model:
        raise RefusedCallerError(
            HTTPStatus.NOT_FOUND,
            "model_not_found",
            "model",
            f"the model {model!r} does not exist, or this API key has no access to it. "
            f"{did_you_mean(str(model), tenant.by_model)}",
        )
    return tenant.by_model[model]


def key_of(headers: Headers) -> str:
    """The API key that a request sends; empty if it sends none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
