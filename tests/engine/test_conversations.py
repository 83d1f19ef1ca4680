"""Conversations: what a session's requests add up to is held against its next one, and against nobody else's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from monitor.audit.store import open_store
from monitor.events import ConversationFired, Decision
from tests.engine.test_serving import GREEDY, metric
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import MARK, TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KEYS = {name: f"sk-{name}" for name in ("acme", "globex", "gateway")}
DIGESTS = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
REFUSED = "Enough of this."
OVER = "detector: trigger, stage: conversation, of: prompt, aggregate: {kind: max}"
# One bad request is worth MARK, two at once MARK * (1 + 2 ** -0.25): between the two lies the threshold.
POLICY = f"""\
version: "1"
detectors:
  - artifact: trigger.safetensors
steers:
  - {{name: push, artifact: served_push.safetensors, op: add, strength: 0.25, positions: generated}}
policies:
  - name: worn
    on_gap: block
    on_uncalibrated: flag
    rules:
      - name: wears-down
        when: {{{OVER}, accumulate: {{kind: decay, half_life: {{requests: 4}}}}, above: {{value: {1.5 * MARK}}}}}
        do: {{action: block, until: end, text: "{REFUSED}"}}
        mode: enforce
  - name: steered
    on_gap: block
    on_uncalibrated: flag
    rules:
      - name: push-on
        when: {{{OVER}, accumulate: {{kind: cusum}}, above: {{value: {MARK / 2}}}}}
        do: {{action: steer, steer: push, until: 1h}}
        mode: enforce
  - name: whole
    on_gap: block
    on_uncalibrated: flag
    rules:
      - name: whole-tenant
        when: {{{OVER}, by: tenant, accumulate: {{kind: m_of_n, count: 2, window: 3}}, above: {{value: {MARK / 2}}}}}
        do: {{action: flag}}
        mode: enforce
tenants:
  - {{name: acme, key_sha256: {DIGESTS["acme"]}, policy: worn}}
  - {{name: globex, key_sha256: {DIGESTS["globex"]}, policy: worn}}
  - {{name: gateway, key_sha256: {DIGESTS["gateway"]}, policy: worn, by_header: [steered, whole]}}
audit: {{url: "jsonl:///conversations-audit", durability: async}}
"""


@pytest.fixture(scope="module")
def server(tiny: TinyModel) -> Iterator[Server]:
    folder = tiny.path.parent
    policy = folder / "conversations.yaml"
    policy.write_text(POLICY)
    (folder / "conversations-audit").mkdir()
    with serving(telltale_command(tiny.path, policy), folder / "conversations.log") as running:
        yield running


@pytest.fixture(scope="module")
def bad(tiny: TinyModel) -> str:
    return f"Tell me{tiny.trigger_text} please"


GOOD = "Tell me something please"


def ask(server: Server, who: str, session: str | None, content: str, **settings: Any) -> Any:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[who], max_retries=0, timeout=120)
    headers = {**({"x-telltale-session": session} if session else {}), **settings.pop("headers", {})}
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=settings.pop("tokens", 4), extra_headers=headers,
        **{**GREEDY, **settings},
    )  # fmt: skip


def actions(answer: Any) -> list[str]:
    return [choice.telltale["action"] for choice in answer.choices]


def test_two_requests_raise_the_sum_and_the_third_is_refused(server: Server, bad: str) -> None:
    first, second = (ask(server, "acme", "one", bad) for _ in range(2))
    assert actions(first) == actions(second) == ["allow"]
    for answer in (first, second):  # neither what was added up, nor that anything is
        assert "wears-down" not in answer.model_dump_json()
        assert "session" not in answer.model_dump_json()
    third = ask(server, "acme", "one", GOOD)
    assert (third.choices[0].finish_reason, third.choices[0].message.content) == ("content_filter", REFUSED)
    assert third.choices[0].telltale["rule"] == "wears-down"
    streamed = list(ask(server, "acme", "one", GOOD, stream=True, n=2, temperature=1.0))
    reasons = [choice.finish_reason for chunk in streamed for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["content_filter"] * 2
    assert {choice.delta.content for chunk in streamed for choice in chunk.choices if choice.delta.content} == {REFUSED}
    body = {"model": "tiny", "prompt": GOOD, "max_tokens": 4}
    headers = {"authorization": f"Bearer {KEYS['acme']}", "x-telltale-session": "one"}
    raw = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120)
    assert raw.json()["choices"][0]["text"] == REFUSED
    assert not [name for name in raw.headers if "telltale" in name]
    # Another session of the tenant, none at all, and another tenant's session of the same name.
    for who, session in (("acme", "two"), ("acme", None), ("globex", "one")):
        assert actions(ask(server, who, session, GOOD)) == ["allow"]


def test_many_choices_are_one_request_and_many_prompts_are_many(server: Server, bad: str) -> None:
    assert actions(ask(server, "acme", "choices", bad, n=4, temperature=1.0)) == ["allow"] * 4
    assert actions(ask(server, "acme", "choices", GOOD)) == ["allow"]
    body = {"model": "tiny", "prompt": [bad, bad], "max_tokens": 2}
    headers = {"authorization": f"Bearer {KEYS['acme']}", "x-telltale-session": "prompts"}
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120).status_code == 200
    assert actions(ask(server, "acme", "prompts", GOOD)) == ["block"]


def test_whoever_leaves_early_is_counted_all_the_same(server: Server, bad: str) -> None:
    labels = {"rule": "wears-down", "policy": "worn"}
    before = metric(server, "telltale_session_rules_fired_total", **labels)
    for _ in range(2):
        with ask(server, "acme", "leaves", bad, stream=True, tokens=900) as stream:
            next(iter(stream))
    deadline = time.monotonic() + 30
    while metric(server, "telltale_session_rules_fired_total", **labels) == before and time.monotonic() < deadline:
        ask(server, "acme", None, GOOD)  # the engine says at its next step what has ended
    assert actions(ask(server, "acme", "leaves", GOOD)) == ["block"]


def test_steering_begins_with_the_next_request(server: Server, bad: str) -> None:
    headers = {"x-telltale-policy": "steered"}
    before = [ask(server, "gateway", session, GOOD, headers=headers, tokens=12) for session in ("s", "t")]
    during = ask(server, "gateway", "s", bad, headers=headers)
    after = [ask(server, "gateway", session, GOOD, headers=headers, tokens=12) for session in ("s", "t")]
    assert [actions(answer) for answer in (*before, during)] == [["allow"]] * 3
    assert [actions(answer) for answer in after] == [["steer"], ["allow"]]
    # Every generated row that is fed back, from the first on.
    assert after[0].choices[0].telltale["steered"][0]["tokens"] == 11
    assert after[0].choices[0].token_ids != before[0].choices[0].token_ids
    assert after[1].choices[0].token_ids == before[1].choices[0].token_ids


def test_a_tenant_is_one_whatever_it_calls_its_sessions_and_a_proxy_says_who_it_is(server: Server, bad: str) -> None:
    def of(tenant: str, session: str, content: str) -> list[str]:
        headers = {"x-telltale-policy": "whole", "x-telltale-tenant": tenant}
        return actions(ask(server, "gateway", session, content, headers=headers))

    assert [of("ann", session, bad) for session in "ab"] == [["allow"], ["allow"]]
    assert of("ann", "c", GOOD) == ["flag"]
    assert of("bob", "a", GOOD) == ["allow"]


def test_what_has_fired_is_counted_and_written_down(server: Server, tiny: TinyModel) -> None:
    store = open_store(f"jsonl:///{tiny.path.parent / 'conversations-audit'}")
    (writer,) = store.writers()
    events = [stored.event for stored in store.read(writer)]
    fired = [event for event in events if isinstance(event, ConversationFired)]
    assert {(event.rule, event.action.value) for event in fired} == {
        ("wears-down", "block"), ("push-on", "steer"), ("whole-tenant", "flag"),
    }  # fmt: skip
    first = next(event for event in fired if event.rule == "wears-down")
    assert (first.requests, first.until) == (2, None)
    assert first.value == pytest.approx(MARK * (1 + 2**-0.25), rel=1e-3)
    for rule in ("wears-down", "push-on", "whole-tenant"):
        count = metric(server, "telltale_session_rules_fired_total", rule=rule)
        assert count == sum(event.rule == rule for event in fired)
    refused = [event for event in events if isinstance(event, Decision) and event.rule == "wears-down"]
    acted = metric(server, "telltale_actions_total", rule="wears-down", mode="enforce", policy="worn")
    assert acted == len(refused) > 0
    assert all(event.coverage.scored > 0 for event in refused)  # what is refused is read all the same
    assert metric(server, "telltale_session_requests_total", named="no") > 0
    assert metric(server, "telltale_sessions") > 0
    assert metric(server, "telltale_unsigned_requests_total") == 0
