"""The routes of the policy: what they need, and what is shown."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from monitor.access import KeyScope
from serving.api.control import control_routes, without_passwords
from serving.api.paths import need_of

ROUTES = [
    ("GET", "/policy", KeyScope.OBSERVE),
    ("PUT", "/policy", KeyScope.ADMIN),
    ("POST", "/policy/reload", KeyScope.ADMIN),
    ("GET", "/policy/history", KeyScope.OBSERVE),
    ("GET", "/policy/history/0", KeyScope.OBSERVE),
    ("POST", "/policy/rollback", KeyScope.ADMIN),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
async def test_each_route_is_there_and_on_the_list_of_what_needs_a_key(method: str, path: str, scope: KeyScope) -> None:
    app = FastAPI()
    app.include_router(control_routes(lambda: None))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
        answer = await client.request(method, f"/telltale/v1{path}")
    assert (answer.status_code, answer.json()) == (503, {"detail": "the server is starting"})
    need = need_of(method, f"/telltale/v1{path}")
    assert need is not None
    assert scope in need.scopes
    assert KeyScope.INFER not in need.scopes
    assert (KeyScope.OBSERVE in need.scopes) == (scope is KeyScope.OBSERVE)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('audit: {url: "postgresql://telltale:s3cret@db/audit"}', 'audit: {url: "postgresql://telltale:***@db/audit"}'),
        ("url: redis://:p@ss@host:6379/0", "url: redis://:***@host:6379/0"),
        ('audit: {url: "sqlite:///telltale.db"}', 'audit: {url: "sqlite:///telltale.db"}'),
        ("url: https://example.org:8443/hook # a@b", "url: https://example.org:8443/hook # a@b"),
    ],
)
def test_passwords_are_not_shown(text: str, shown: str) -> None:
    assert without_passwords(text) == shown
