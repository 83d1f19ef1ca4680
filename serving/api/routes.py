"""Which of vLLM's routes have the model write something. Pure data."""

from __future__ import annotations

CHAT_ROUTES = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/v2/chat", "/cohere/v2/chat", "/v1/systemone")
ROUTE_OF_ANY_BODY = "/invocations"
"""SageMaker's: the body says whether it is a chat."""
_RAW_ROUTES = ("/v1/completions", "/inference/v1/generate", ROUTE_OF_ANY_BODY)


def is_under(path: str, routes: tuple[str, ...]) -> bool:
    """Whether a path is one of these, or below one."""
    return any(path == route or path.startswith(f"{route}/") for route in routes)


def generates(method: str, path: str) -> bool:
    """Whether a request makes the model write."""
    return method == "POST" and is_under(path, (*CHAT_ROUTES, *_RAW_ROUTES))
