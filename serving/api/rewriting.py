"""Changes the body of a request for its second attempt. Knows how the routes spell a system prompt and a model."""

from __future__ import annotations

import json
from typing import Any, Final

from probes.errors import TelltaleError

_MESSAGES: Final = "/v1/messages"
"""Anthropic's route: the system prompt is a key of its own."""
_RESPONSES: Final = "/v1/responses"
_SYSTEM_ROLES: Final = frozenset({"system", "developer"})


class RewriteError(TelltaleError, ValueError):
    """A body that cannot be changed as the rule says."""


def parsed(body: bytes) -> dict[str, Any]:
    """The body as JSON.

    Raises:
        RewriteError: it is no JSON object.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RewriteError("the request's body is no JSON") from error
    if not isinstance(content, dict):
        raise RewriteError("the request's body is no JSON object")
    return content


def with_model(body: bytes, model: str) -> bytes:
    """Ask for another model.

    Raises:
        RewriteError: the body is no JSON object.
    """
    return json.dumps({**parsed(body), "model": model}).encode()


def unstored(body: bytes) -> bytes:
    """Ask for a response that can be had by nobody later: one that is not released must not be.

    Bodies that are no JSON objects are left to vLLM.
    """
    try:
        return json.dumps({**parsed(body), "store": False}).encode()
    except RewriteError:
        return body


def is_stored_route(path: str) -> bool:
    """Whether the route keeps responses, to be asked for again."""
    return path.rstrip("/") == _RESPONSES


def with_system(path: str, body: bytes, system: str) -> bytes:
    """Put a system prompt before the conversation; one that is there already stays, behind it.

    Args:
        path: of the route.
        body: of the request.
        system: the text.
    Raises:
        RewriteError: the route's bodies are not known, or a prompt has no text that something could stand before.
    """
    content = parsed(body)
    path = path.rstrip("/")
    if path == _RESPONSES:
        content["instructions"] = _joined(system, content.get("instructions"))
    elif path.startswith(_MESSAGES):
        content["system"] = _before(content.get("system"), system)
    elif isinstance(content.get("messages"), list):
        content["messages"] = _in_messages(content["messages"], system)
    elif "prompt" in content:
        content["prompt"] = _in_prompt(content["prompt"], system)
    else:
        raise RewriteError(f"nobody knows where a system prompt stands in a body for {path}")
    return json.dumps(content).encode()


def _in_messages(messages: list[Any], system: str) -> list[Any]:
    first = messages[0] if messages else None
    if isinstance(first, dict) and first.get("role") in _SYSTEM_ROLES:
        return [{**first, "content": _before(first.get("content"), system)}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def _before(content: Any, system: str) -> Any:
    if isinstance(content, list):
        return [{"type": "text", "text": system}, *content]
    return _joined(system, content)


def _joined(system: str, text: Any) -> str:
    return f"{system}\n\n{text}" if isinstance(text, str) and text else system


def _in_prompt(prompt: Any, system: str) -> Any:
    if isinstance(prompt, str):
        return _joined(system, prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(item, str) for item in prompt):
        return [_joined(system, item) for item in prompt]
    raise RewriteError("a prompt of token ids has no text that a system prompt could stand before")
