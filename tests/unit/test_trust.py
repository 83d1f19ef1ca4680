"""Trusted request data: only this server's key, this request and its children, and no byte changed."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from monitor.attempt import Attempt
from monitor.segments import PromptMap, Run
from monitor.types import PromptEvent, Role
from probes.card import Format
from serving.engine.trust import KEY_VARIABLE, TrustedData, ensure_key, seal, unseal

KEY = {KEY_VARIABLE: "k" * 64}
RUNS = (Run(Role.TEMPLATE, 3), Run(Role.USER, 5), Run(Role.TOOL, 2))
DATA = TrustedData("strict", Format.CHAT, PromptMap(RUNS, 10, (PromptEvent.SPECIAL_TOKEN_IN_CONTENT,)))
runs = st.lists(st.builds(Run, st.sampled_from(Role), st.integers(1, 10**6)), max_size=9).map(tuple)
prompts = st.builds(
    PromptMap, st.none() | runs, st.integers(0, 10**6), st.lists(st.sampled_from(PromptEvent), max_size=2).map(tuple)
)
ids = st.text(min_size=1, max_size=30)


data = st.builds(
    TrustedData,
    st.none() | st.text(),
    st.sampled_from(Format),
    prompts,
    attempt=st.sampled_from(Attempt),
    refusal=st.none() | st.tuples(st.text(), st.text()),
    judge=st.booleans(),
)


@given(request_id=ids, data=data)
def test_what_is_sealed_is_unsealed(request_id: str, data: TrustedData) -> None:
    assert unseal(seal(data, request_id, environment=KEY), request_id, environment=KEY) == data


@pytest.mark.covers("n > 1", "roles kept")
@given(request_id=st.from_regex(r"[a-z0-9_-]{1,20}", fullmatch=True), child=st.integers(0, 999))
def test_the_children_of_a_request_carry_its_data(request_id: str, child: int) -> None:
    assert unseal(seal(DATA, request_id, environment=KEY), f"{child}_{request_id}", environment=KEY) == DATA


@pytest.mark.covers("trusted data forged or changed", "kept out")
@pytest.mark.parametrize(
    "other", ["req-2", "req-1 ", "", "x_req-1", "0_req-2", "0_0_req-1", "req-1_0", "0-req-1", "_req-1"]
)
def test_another_request_is_not_trusted(other: str) -> None:
    assert unseal(seal(DATA, "req-1", environment=KEY), other, environment=KEY) is None


@pytest.mark.covers("trusted data forged or changed", "kept out")
def test_another_key_is_not_trusted() -> None:
    assert unseal(seal(DATA, "a", environment=KEY), "a", environment={KEY_VARIABLE: "l" * 64}) is None


@pytest.mark.covers("trusted data forged or changed", "kept out")
@given(place=st.integers(0, 10**6), letter=st.characters())
def test_a_changed_byte_is_not_trusted(place: int, letter: str) -> None:
    sealed = seal(DATA, "a", environment=KEY)
    for field in ("body", "mac"):
        text = sealed[field]
        at = place % len(text)
        changed = text[:at] + letter + text[at + 1 :]
        if changed != text:
            assert unseal({**sealed, field: changed}, "a", environment=KEY) is None


@pytest.mark.covers("trusted data forged or changed", "kept out")
@pytest.mark.parametrize(
    ("said", "instead"),
    [
        (["tool", 2], ["user", 2]),
        (["tool", 2], ["tool", 3]),
        (10, 11),
        (["special_token_in_content"], []),
        (["template", 3], ["system", 3]),
    ],
)
def test_other_roles_than_the_sealed_ones_are_not_trusted(said: object, instead: object) -> None:
    """Whoever sits between could otherwise rename a tool's text, and the rules on it would step over it."""
    sealed = seal(DATA, "a", environment=KEY)
    written, other = (json.dumps(value, separators=(",", ":")) for value in (said, instead))
    assert sealed["body"].count(written) == 1
    assert unseal({**sealed, "body": sealed["body"].replace(written, other)}, "a", environment=KEY) is None


@pytest.mark.covers("trusted data forged or changed", "kept out")
@pytest.mark.parametrize(
    "value",
    [None, 3, "text", [], {}, {"body": "{}"}, {"mac": "0" * 64}, {"body": 1, "mac": "0"}, {"body": "{}", "mac": None}]
    + [{"body": "{}", "mac": mac} for mac in ("", "é", "\ud800", "0" * 64)]
    + [{"body": "\ud800", "mac": "0" * 64}],
)
def test_whatever_else_stands_there_is_not_trusted_and_breaks_nothing(value: object) -> None:
    assert unseal(value, "a", environment=KEY) is None


def test_a_process_without_key_fails() -> None:
    with pytest.raises(RuntimeError, match=KEY_VARIABLE):
        seal(DATA, "a", environment={})


def test_the_key_is_made_once() -> None:
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    ensure_key(first)
    ensure_key(second)
    assert len(first[KEY_VARIABLE]) == 64
    assert first != second
    kept = dict(first)
    ensure_key(first)
    assert first == kept
