"""The routes of the policy, over a real application: who is let in, and what is shown."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from serving.api.control import Keys, control_routes, without_passwords

ROUTES = [
    ("GET", "/policy"),
    ("PUT", "/policy"),
    ("POST", "/policy/reload"),
    ("GET", "/policy/history"),
    ("GET", "/policy/history/0"),
    ("POST", "/policy/rollback"),
]


def app_with(*keys: str) -> FastAPI:
    app, held = FastAPI(), Keys()
    held.accept(keys)
    app.include_router(control_routes(lambda: None, held))
    return app


async def status(app: FastAPI, method: str, path: str, key: str | None) -> int:
    headers = {"authorization": key} if key is not None else {}
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return (await client.request(method, f"/telltale/v1{path}", headers=headers)).status_code


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_only_a_key_of_the_server_lets_in(method: str, path: str) -> None:
    app = app_with("sk-one", "sk-two")
    for key in ("Bearer sk-one", "bearer sk-two"):
        assert await status(app, method, path, key) == 503  # let in: the server is starting
    for key in (None, "", "Bearer ", "Bearer sk-three", "sk-one", "Basic sk-one"):
        assert await status(app, method, path, key) == 401


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_server_without_keys_lets_nobody_in(method: str, path: str) -> None:
    for key in (None, "Bearer ", "Bearer anything"):
        assert await status(app_with(), method, path, key) == 403


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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
