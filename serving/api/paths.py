"""The allow list: what each path of the server needs. A path that does not stand here is not served."""

from __future__ import annotations

import re
from enum import Enum, auto

from starlette.types import Scope

from monitor.access import KeyScope


class Need(Enum):
    """What has to come with a request for a path.

    ``NOTHING`` is for probes of load balancers. ``ANY_KEY`` tells nothing of anybody. ``METRICS`` is ``OBSERVE`` unless
    the server's metrics are open. ``CLOSED`` is a path of vLLM that was judged, and is served to nobody.
    """

    NOTHING = auto()
    ANY_KEY = auto()
    INFER = auto()
    METRICS = auto()
    OBSERVE = auto()
    ADMIN = auto()
    CLOSED = auto()

    @property
    def scopes(self) -> frozenset[KeyScope]:
        """The scopes of which a key must have one."""
        return _SCOPES[self]


_SCOPES = {
    Need.NOTHING: frozenset(KeyScope),
    Need.ANY_KEY: frozenset(KeyScope),
    Need.INFER: frozenset({KeyScope.INFER}),
    Need.METRICS: frozenset({KeyScope.OBSERVE, KeyScope.ADMIN}),
    Need.OBSERVE: frozenset({KeyScope.OBSERVE, KeyScope.ADMIN}),
    Need.ADMIN: frozenset({KeyScope.ADMIN}),
    Need.CLOSED: frozenset[KeyScope](),
}
_PATHS = {
    Need.NOTHING: ("/health", "/ready", "/ping"),
    Need.ANY_KEY: ("/version",),
    Need.INFER: (
        "/v1/models",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/systemone",
        "/v2/chat",
        "/cohere/v2/chat",
        "/invocations",
        "/generative_scoring",
        "/tokenize",
        "/detokenize",
    ),
    Need.OBSERVE: ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/load"),
    # Disaggregated and elastic serving, which is refused, and takes raw sampling parameters or stops what others sent.
    Need.CLOSED: (
        "/abort_requests",
        "/fault_tolerance/apply",
        "/fault_tolerance/status",
        "/inference/v1/abort_requests",
        "/inference/v1/generate",
        "/is_scaling_elastic_ep",
        "/kv_event_sources",
        "/scale_elastic_ep",
        "/v1/chat/completions/derender",
        "/v1/chat/completions/render",
        "/v1/completions/derender",
        "/v1/completions/render",
        "/v1/messages/render",
        "/v1/responses/render",
    ),
}
_NEEDS = {path: need for need, paths in _PATHS.items() for path in paths}
_BY_ID = re.compile(r"/v1/responses/[^/]+(/cancel)?")
_CONTROL = "/telltale"
_READING = frozenset({"GET", "HEAD"})


def need_of(method: str, path: str) -> Need | None:
    """What a request needs.

    Args:
        method: of it, in capitals.
        path: below the server's root path.
    Returns: None for a path that nobody has judged, which is not served either.
    """
    path = path.rstrip("/")
    known = _NEEDS.get(path)
    if known is not None:
        return known
    if _below(path, _CONTROL):
        return Need.OBSERVE if method in _READING else Need.ADMIN
    if _below(path, "/metrics"):
        return Need.METRICS
    if _below(path, "/static"):  # what the documentation is drawn with
        return Need.OBSERVE
    return Need.INFER if _BY_ID.fullmatch(path) else None


def is_for_tenants(path: str) -> bool:
    """Whether a tenant has to be known for a path; of one that nobody has judged, too."""
    return need_of("GET", path) in {Need.INFER, Need.CLOSED, None}


def path_in(scope: Scope) -> str:
    """The path below the root path, as Starlette's router takes it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if root and path.startswith(root) and path[len(root) :][:1] in {"", "/"}:
        return path[len(root) :]
    return path


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")
