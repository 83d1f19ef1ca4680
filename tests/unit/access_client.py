"""An application behind the outermost layer, and callers with keys of every scope."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from monitor.access import Access, KeyScope
from serving.api.access import Gate, put_before
from serving.api.keyring import Holder, KeyRing, digest_of

KEYS = {name: f"sk-{name}" for name in ("sender", "watcher", "admin", "both")}
SCOPES = {
    "sender": {KeyScope.INFER},
    "watcher": {KeyScope.OBSERVE},
    "admin": {KeyScope.ADMIN},
    "both": {KeyScope.INFER, KeyScope.OBSERVE},
}
RING = KeyRing([Holder(digest_of(KEYS[name]), frozenset(scopes)) for name, scopes in SCOPES.items()])
OPEN_RING = KeyRing([Holder(digest_of(KEYS["watcher"]), frozenset({KeyScope.OBSERVE}))])
CHAT = "/v1/chat/completions"
POLICY = "/telltale/v1/policy"


def make_client(
    access: Access | None = None, ring: KeyRing = RING, *, local: bool = False, root: str = "", gate: Gate | None = None
) -> TestClient:
    """An application that answers every path and says what it got, with CORS as vLLM has it."""
    app = FastAPI(root_path=root, docs_url=None, redoc_url=None, openapi_url=None)
    gate = gate or Gate()
    put_before(app, gate)

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
    async def anything(request: Request) -> dict[str, int]:
        return {"body": len(await request.body())}

    @app.websocket("/v1/realtime")
    async def socket(connection: WebSocket) -> None:
        await connection.accept()

    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    gate.accept(access or Access(), ring, local=local)
    return TestClient(app)


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}
