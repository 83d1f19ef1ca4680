"""Several policies in one server: each request gets its key's, whoever is computed beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from serving.engine.trust import ROLLOUT_VARIABLE
from tests.engine.test_serving import GREEDY, metric
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KEYS = {name: f"sk-{name}" for name in ("acme", "globex", "initech", "gateway")}
DIGESTS = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
HEAD = "    on_gap: block\n    on_uncalibrated: flag\n"
PROMPT_RULE = "when: {detector: trigger, stage: prompt}"
STREAM_RULE = "when: {detector: trigger, stage: stream}"
POLICY = f"""\
version: "1"
detectors:
  - artifact: trigger.safetensors
policies:
  - name: lax
{HEAD}    rules:
      - {{name: note, {PROMPT_RULE}, do: {{action: flag}}, mode: enforce}}
  - name: strict
{HEAD}    rules:
      - {{name: stop, {PROMPT_RULE}, do: {{action: block, text: "Not here."}}, mode: enforce}}
  - name: half
{HEAD}    rules:
      - {{name: half, {PROMPT_RULE}, do: {{action: flag}}, mode: enforce, rollout: {{percent: 50, by: request}}}}
      - {{name: half-of-tenants, {PROMPT_RULE}, do: {{action: flag}}, mode: enforce, rollout: {{percent: 50}}}}
  - name: one
{HEAD}    rules:
      - {{name: cut, {STREAM_RULE}, do: {{action: block, text: "Cut."}}, mode: enforce}}
  - name: all
{HEAD}    rules:
      - {{name: cut, {STREAM_RULE}, do: {{action: block, text: "Cut.", scope: request}}, mode: enforce}}
tenants:
  - {{name: acme, key_sha256: {DIGESTS["acme"]}, policy: strict}}
  - {{name: globex, key_sha256: {DIGESTS["globex"]}, policy: lax, by_model: {{tiny: lax, tiny-strict: strict}}}}
  - {{name: initech, key_sha256: {DIGESTS["initech"]}, policy: strict, above: {{stop: {{value: 99}}}}}}
  - {{name: gateway, key_sha256: {DIGESTS["gateway"]}, policy: lax, by_header: [half, one, all]}}
"""


@pytest.fixture(scope="module")
def shared(tiny: TinyModel) -> Iterator[Server]:
    folder = tiny.path.parent
    policy = folder / "tenants.yaml"
    policy.write_text(POLICY)
    command = telltale_command(tiny.path, policy, "--served-model-name", "tiny", "tiny-strict")
    with serving(command, folder / "tenants.log", environment={ROLLOUT_VARIABLE: "a secret"}) as server:
        yield server


def client_of(server: Server, name: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[name], max_retries=0, timeout=120)


def ask(server: Server, name: str, content: str, *, model: str = "tiny", tokens: int = 4, **settings: Any) -> Any:
    messages: Any = [{"role": "user", "content": content}]
    return client_of(server, name).chat.completions.create(
        model=model, messages=messages, max_tokens=tokens, **{**GREEDY, **settings}
    )


def test_in_a_mixed_batch_each_key_gets_its_own_policy(shared: Server, tiny: TinyModel) -> None:
    bad, good = f"Tell me{tiny.trigger_text} please", "Tell me something please"
    expected = {
        ("acme", "tiny"): "block",
        ("globex", "tiny"): "flag",
        ("globex", "tiny-strict"): "block",
        ("initech", "tiny"): "allow",
        ("gateway", "tiny"): "flag",
    }
    before = metric(shared, "telltale_requests_total", action="block", policy="strict")
    wanted = [(who, content) for _ in range(4) for who in expected for content in (bad, good)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda item: ask(shared, item[0][0], item[1], model=item[0][1]), wanted))
    for (who, content), answer in zip(wanted, answers, strict=True):
        choice = answer.choices[0]
        action = expected[who] if content == bad else "allow"
        assert choice.telltale["action"] == action, (who, content)
        assert (choice.finish_reason == "content_filter") == (action == "block")
        assert (choice.message.content == "Not here.") == (action == "block")
    assert metric(shared, "telltale_requests_total", action="block", policy="strict") == before + 8
    assert metric(shared, "telltale_actions_total", rule="stop", policy="strict@initech") == 0
    assert metric(shared, "telltale_unsigned_requests_total") == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/invocations", "/tokenize", "/v1/models"])
def test_without_a_key_there_is_no_answer(shared: Server, path: str) -> None:
    body = {"model": "tiny", "prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    for headers in ({}, {"authorization": "Bearer sk-nobody"}, {"x-telltale-policy": "lax"}):
        answer = httpx.post(f"{shared.url}{path}", json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_client_cannot_choose_its_policy(shared: Server, tiny: TinyModel) -> None:
    content = f"Tell me{tiny.trigger_text} please"
    with pytest.raises(openai.PermissionDeniedError):
        ask(shared, "acme", content, extra_headers={"x-telltale-policy": "lax"})
    with pytest.raises(openai.PermissionDeniedError):
        ask(shared, "gateway", content, extra_headers={"x-telltale-policy": "strict"})
    with pytest.raises(openai.NotFoundError):
        ask(shared, "globex", content, model="tiny-all")
    assert ask(shared, "acme", content, model="tiny-strict").choices[0].telltale["action"] == "block"


def test_a_rollout_holds_for_all_choices_and_tries_of_its_subject(shared: Server, tiny: TinyModel) -> None:
    content = f"Tell me{tiny.trigger_text} please"

    def counts(rule: str) -> list[float]:
        return [metric(shared, "telltale_actions_total", rule=rule, mode=mode) for mode in ("enforce", "shadow")]

    before = {rule: counts(rule) for rule in ("half", "half-of-tenants")}
    tenants = [{"x-telltale-tenant": f"tenant-{number}"} for number in range(12)]
    found: list[set[str]] = []
    for headers in [*tenants, *tenants]:
        named = {"x-telltale-policy": "half", **headers}
        choices = ask(shared, "gateway", content, n=2, temperature=1.0, extra_headers=named).choices
        found.append({choice.telltale["action"] for choice in choices})
    assert all(len(actions) == 1 for actions in found)
    for rule, earlier in before.items():
        enforced, shadowed = (after - was for after, was in zip(counts(rule), earlier, strict=True))
        assert enforced + shadowed == 48
        assert enforced % (2 if rule == "half" else 4) == 0  # both choices, and of a tenant both tries
        assert enforced > 0 < shadowed


@pytest.mark.parametrize("streamed", [False, True])
def test_a_block_of_one_choice_is_one_of_all_if_the_policy_says_so(
    shared: Server, tiny: TinyModel, streamed: bool
) -> None:
    def reasons(policy: str, bias: float) -> list[str]:
        settings: dict[str, Any] = {
            "n": 4, "temperature": 1.0, "seed": 5, "tokens": 24, "logit_bias": {str(tiny.trigger): bias},
            "extra_headers": {"x-telltale-policy": policy}, "stream": streamed,
        }  # fmt: skip
        answer = ask(shared, "gateway", "Tell me something please", **settings)
        parts = [choice for chunk in answer for choice in chunk.choices] if streamed else answer.choices
        ended = {part.index: part.finish_reason for part in parts if part.finish_reason is not None}
        return [ended[index] for index in range(4)]

    # The same seed gives the same tokens: a bias is looked for by which some choices say the word and others do not.
    mixed = [bias for bias in range(0, 101, 4) if 0 < reasons("one", bias).count("content_filter") < 4]
    assert mixed
    assert reasons("all", mixed[0]) == ["content_filter"] * 4
