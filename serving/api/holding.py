"""The layer that withholds replies: where a policy may have a request answered anew, or its reply judged as a whole.

Pure ASGI, inside of the layer that says where a request comes from. Requests of all other policies pass untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from monitor.attempt import Attempt, Holds
from monitor.compiled import CompiledPolicy
from monitor.types import ActionCode
from serving.api.client import Client
from serving.api.desk import Desk
from serving.api.exchange import Exchange
from serving.api.rewriting import is_stored_route, unstored
from serving.api.withheld import WithheldResponse
from serving.engine.frontend import Frontend
from serving.hold import Hold
from serving.origin import current_origin, enter_origin, leave_origin


class HoldMiddleware:
    """Withholds the replies of those policies that ask for it.

    Args:
        app: the application behind it, which is asked as often as it takes.
        frontend: of this process.
        desk: who is turned to; None until the server is ready.
        root_path: prefix under which the application is mounted.
    """

    def __init__(
        self, app: ASGIApp, *, frontend: Frontend, desk: Callable[[], Desk | None], root_path: str = ""
    ) -> None:
        self._app = app
        self._frontend = frontend
        self._desk = desk
        self._root = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        desk = self._desk() if scope["type"] == "http" and scope["method"] == "POST" else None
        holds = self._policy().holds if desk is not None else Holds.NOTHING
        if desk is None or holds is Holds.NOTHING:
            await self._app(scope, receive, send)
            return
        client = Client(receive)
        path = scope["path"].removeprefix(self._root)
        body = await client.read()
        if is_stored_route(path):
            body = unstored(body)

        async def attempt(body: bytes, hold: Hold) -> WithheldResponse:
            waits_for_prompt = holds is Holds.PROMPT and hold.attempt is Attempt.FIRST
            may_pass = (lambda: self._is_clean(hold)) if waits_for_prompt else (lambda: False)
            response = WithheldResponse(send, may_pass)
            token = enter_origin(replace(current_origin(), hold=hold))
            try:
                await self._app(_with_length(scope, body), client.with_body(body), response)
            finally:
                hold.is_open = False
                leave_origin(token)
            return response

        await Exchange(desk, attempt, client, send=send, path=path, body=body).run()

    def _policy(self) -> CompiledPolicy:
        origin = current_origin()
        policies, named = self._frontend.plan_of(origin).policies, origin.caller.policy
        return next((policy for policy in policies if policy.name == named), policies[0])

    def _is_clean(self, hold: Hold) -> bool:
        """Whether the prompt has been judged, and nothing has to be withheld because of it."""
        name = hold.only_request
        record = self._frontend.record(name) if name is not None else None
        if record is None or (record.decided is not None and record.decided.action >= ActionCode.ESCALATE):
            return False
        hold.is_open = False
        return True


def _with_length(scope: Scope, body: bytes) -> Scope:
    headers = MutableHeaders(raw=list(scope["headers"]))
    if "transfer-encoding" not in headers:
        headers["content-length"] = str(len(body))
    return {**scope, "headers": headers.raw}
