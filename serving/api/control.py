"""Routes by which an operator says what a server runs: the policy, its history, and the way back.

Who may do so is for the layer over all routes: below this prefix reading needs the scope ``observe``, all else needs
``admin``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from monitor.history import HistoryError, Reload
from monitor.types import ReloadOutcome, ReloadSource
from serving.engine.reloader import Reloader

PREFIX = "/telltale/v1"
MAX_POLICY_BYTES = 1 << 20
_YAML = "application/yaml"
_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s]+@")
_STATUS = {
    ReloadOutcome.APPLIED: HTTPStatus.OK,
    ReloadOutcome.UNCHANGED: HTTPStatus.OK,
    ReloadOutcome.REFUSED: HTTPStatus.UNPROCESSABLE_ENTITY,
    ReloadOutcome.RESTART_NEEDED: HTTPStatus.CONFLICT,
    ReloadOutcome.NO_ROOM: HTTPStatus.CONFLICT,
    ReloadOutcome.FAILED: HTTPStatus.SERVICE_UNAVAILABLE,
}


class RollBack(BaseModel):
    """Where to go back to."""

    model_config = ConfigDict(extra="forbid", strict=True)

    to: int | None = Field(default=None, ge=0, description="number of the entry in the history; the one before if null")


def control_routes(reloader: Callable[[], Reloader | None]) -> APIRouter:
    """The routes.

    Args:
        reloader: gives it once the server is ready.
    """
    router = APIRouter(prefix=PREFIX, tags=["telltale"])

    def running() -> Reloader:
        found = reloader()
        if found is None:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "the server is starting")
        return found

    @router.get("/policy")
    async def policy(request: Request) -> Response:
        """The policy that is in force; as it was written, if YAML is asked for."""
        entry = running().history.running
        headers = {"etag": f'"{entry.digest}"'}
        text = without_passwords(entry.text)
        if _YAML in request.headers.get("accept", ""):
            return PlainTextResponse(text, media_type=_YAML, headers=headers)
        return JSONResponse({**described(entry), "policy": text}, headers=headers)

    @router.put("/policy")
    async def put_policy(request: Request) -> Response:
        """Put the policy in the body in force. It must not wait: the file of the start stays as it is."""
        server, text = running(), await _body(request)
        return _answer(await server.reload(text, ReloadSource.API))

    @router.post("/policy/reload")
    async def reload_policy() -> Response:
        """Read the policy file again, as SIGHUP does."""
        return _answer(await running().reload_file(ReloadSource.API))

    @router.get("/policy/history")
    async def history() -> Response:
        """What the server was given so far, the newest first."""
        return JSONResponse({"history": [described(entry) for entry in reversed(list(running().history))]})

    @router.get("/policy/history/{number}")
    async def entry_of_history(number: int) -> Response:
        """One of them, with its text."""
        found = next((entry for entry in running().history if entry.number == number), None)
        if found is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"the history has no entry {number}")
        return JSONResponse({**described(found), "policy": without_passwords(found.text)})

    @router.post("/policy/rollback")
    async def roll_back(where: RollBack | None = None) -> Response:
        """Put in force again what was in force before."""
        try:
            return _answer(await running().roll_back(where.to if where is not None else None))
        except HistoryError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, str(error)) from error

    return router


def described(entry: Reload) -> dict[str, Any]:
    """An entry of the history in plain data, without its text."""
    return {
        "number": entry.number,
        "time": entry.time.isoformat(),
        "source": entry.source.value,
        "outcome": entry.outcome.value,
        "digest": entry.digest,
        "before": entry.before,
        "seconds": round(entry.seconds, 3),
        **({"message": entry.message} if entry.message else {}),
        **({"setting": entry.setting} if entry.setting else {}),
    }


def without_passwords(text: str) -> str:
    """A policy file to be shown: passwords in its URLs are left out, since who may look need not know them."""
    return _PASSWORD.sub(r"\1***@", text)


async def _body(request: Request) -> str:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_POLICY_BYTES:
            raise HTTPException(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a policy has at most {MAX_POLICY_BYTES} bytes of YAML"
            )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, "the body is not UTF-8 text") from error


def _answer(entry: Reload) -> JSONResponse:
    return JSONResponse(described(entry), status_code=_STATUS[entry.outcome])
