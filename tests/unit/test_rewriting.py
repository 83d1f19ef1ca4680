"""Bodies of second attempts: every route keeps its form, a system prompt that is there stays, the rest is untouched."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from serving.api.rewriting import RewriteError, unstored, with_model, with_system

CHAT, RAW, RESPONSES, ANTHROPIC = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "hi"}


def changed(path: str, body: dict[str, Any]) -> Any:
    return json.loads(with_system(path, json.dumps(body).encode(), "S"))


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, {"messages": [USER]}, {"messages": [{"role": "system", "content": "S"}, USER]}),
        (
            CHAT,
            {"messages": [{"role": "system", "content": "old"}, USER]},
            {"messages": [{"role": "system", "content": "S\n\nold"}, USER]},
        ),
        (
            CHAT,
            {"messages": [{"role": "developer", "content": [{"type": "text", "text": "old"}]}]},
            {"messages": [{"role": "developer", "content": [{"type": "text", "text": t} for t in ("S", "old")]}]},
        ),
        ("/invocations", {"messages": []}, {"messages": [{"role": "system", "content": "S"}]}),
        (RAW, {"prompt": "hi"}, {"prompt": "S\n\nhi"}),
        (RAW, {"prompt": ["a", "b"]}, {"prompt": ["S\n\na", "S\n\nb"]}),
        (RESPONSES, {"input": "hi"}, {"input": "hi", "instructions": "S"}),
        (f"{RESPONSES}/", {"input": [USER], "instructions": "old"}, {"input": [USER], "instructions": "S\n\nold"}),
        (ANTHROPIC, {"messages": [USER]}, {"messages": [USER], "system": "S"}),
        (ANTHROPIC, {"messages": [USER], "system": "old"}, {"messages": [USER], "system": "S\n\nold"}),
    ],
)
def test_the_system_prompt_comes_first(path: str, body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert changed(path, body) == expected


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RAW, {"prompt": [1, 2]}),
        (RAW, {"prompt": [[1], [2]]}),
        (RAW, {"prompt": []}),
        (RAW, {"prompt": ["a", [1]]}),
        ("/generate", {"token_ids": [1]}),
    ],
)
def test_where_it_has_no_place_that_is_said(path: str, body: dict[str, Any]) -> None:
    with pytest.raises(RewriteError):
        changed(path, body)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b"\xff"])
def test_what_is_no_object_is_refused_or_left(body: bytes) -> None:
    for change in (lambda: with_system(CHAT, body, "S"), lambda: with_model(body, "m")):
        with pytest.raises(RewriteError):
            change()
    assert unstored(body) == body


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.booleans() | st.none(), max_size=4))
def test_nothing_else_is_changed(others: dict[str, Any]) -> None:
    others = {key: value for key, value in others.items() if key not in {"messages", "model", "store"}}
    body = {**others, "messages": [USER], "model": "old"}
    found = changed(CHAT, body)
    assert {**found, "messages": [USER]} == body
    assert json.loads(with_model(json.dumps(body).encode(), "new")) == {**body, "model": "new"}
    assert json.loads(unstored(json.dumps(body).encode())) == {**body, "store": False}
