"""Policies that withhold replies, and a client that tells how a reply came about."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.server import Server, free_port
from tests.support.tiny import PROMPT, TinyModel
from tests.support.withheld_servers import Outside

KEY = "sk-gateway"
SYSTEM = "Answer shortly and kindly."
REFUSED = "Withheld."
CHAT, RAW = "/v1/chat/completions", "/v1/completions"
JUDGE = "Does the text between the marks speak of a river? {text} Answer yes or no."
REPLY = "when: {detector: trigger, stage: stream}"
ASKED = "when: {detector: trigger, stage: prompt}"
ALWAYS = "when: {detector: trigger, stage: response, aggregate: {kind: mean}, above: {value: -1.0}}"
SHORT = "timeout: 1s"


def rules_of(far: Outside) -> dict[str, str]:
    """By the name of a policy, the rule that it has."""

    def asks(where: str, on_failure: str, when: str = REPLY) -> str:
        to = f"to: {{classifier: {far.url}/{where}}}, {SHORT}"
        return f"{when}, do: {{action: escalate, {to}, on_failure: {on_failure}}}"

    def routes(url: str) -> str:
        to = f"{{upstream: {url}, model: far, key_env: FAR_KEY}}"
        return f"{ASKED}, do: {{action: route, to: {to}, {SHORT}}}"

    probe = "to: {probe: {detector: thrice, stage: stream}}, on_failure: block"
    nobody = f"to: {{classifier: http://127.0.0.1:{free_port()}}}, on_failure: allow"
    judged = f"to: {{judge: '{JUDGE}'}}, on_failure: block"
    return {
        "watch": f"{REPLY}, do: {{action: flag}}",
        "end": f"{ALWAYS.replace('-1.0', '0.1')}, do: {{action: block}}",
        "again": f"{REPLY}, do: {{action: regenerate, system: {SYSTEM}}}",
        "again-if-asked": f"{ASKED}, do: {{action: regenerate, system: {SYSTEM}}}",
        "again-steered": f"{REPLY}, do: {{action: regenerate, steer: push}}",
        "better": f"{ALWAYS}, do: {{action: regenerate, system: {SYSTEM}, otherwise: release}}",
        "probe": f"{REPLY}, do: {{action: escalate, {probe}}}",
        "judge": f"{ALWAYS}, do: {{action: escalate, {judged}}}",
        "flagged": asks("flagged", "allow"),
        "clean": asks("clean", "block"),
        "clean-if-asked": asks("clean", "block", ASKED),
        **{
            f"{fault}-blocks": asks(fault, "block")
            for fault in ("error", "garbage", "truthy", "redirect", "huge", "slow")
        },
        "slow-flags": asks("slow", "flag"),
        "dead-allows": f"{REPLY}, do: {{action: escalate, {nobody}}}",
        "rare": f"{asks('clean', 'block').removesuffix('}')}, budget: 1}}",
        "other": f"{ASKED}, do: {{action: route, to: {{model: tiny-other}}}}",
        "far": routes(f"{far.url}/up/v1"),
        "far-dead": routes(f"http://127.0.0.1:{free_port()}/v1"),
        "far-500": routes(f"{far.url}/down/v1"),
    }


def policy_of(far: Outside) -> str:
    policies = [
        f"  - {{name: {name}, on_gap: block, on_uncalibrated: flag, text: {REFUSED}, "
        f"rules: [{{name: rule, {rule}, mode: enforce}}]}}"
        for name, rule in rules_of(far).items()
    ]
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    names = ", ".join(name for name in rules_of(far) if name != "watch")
    return "\n".join(
        [
            'version: "1"',
            "detectors: [{artifact: trigger.safetensors}, {artifact: thrice_streamed.safetensors}]",
            "steers: [{name: push, artifact: served_push.safetensors, op: add, strength: 0.5, positions: generated}]",
            "policies:",
            *policies,
            f"tenants: [{{name: gateway, key_sha256: {digest}, policy: watch, by_header: [{names}]}}]",
            "audit: {url: 'sqlite:///withheld.db', text: none}",
        ]
    )


@dataclass
class Said:
    """An answer as its client sees it."""

    status: int
    headers: httpx.Headers
    text: str
    reasons: list[str | None]
    described: list[dict[str, Any]] = field(default_factory=list)

    @property
    def outcome(self) -> str | None:
        found = self.headers.get("x-telltale-outcome")
        return found.rpartition("outcome=")[2] if found is not None else None


def ask(
    server: Server,
    policy: str,
    content: str = PROMPT,
    *,
    path: str = CHAT,
    streamed: bool = False,
    system: str | None = None,
    tokens: int = 24,
    **settings: Any,
) -> Said:
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    body = {
        "model": "tiny", "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "stream": streamed, **settings,
        **({"messages": messages} if path == CHAT else {"prompt": content}),
    }  # fmt: skip
    headers = {"authorization": f"Bearer {KEY}", **({"x-telltale-policy": policy} if policy != "watch" else {})}
    answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)
    chunks = (
        [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        if streamed
        else [answer.json()]
    )
    choices = [choice for chunk in chunks for choice in chunk.get("choices", [])]
    parts = [
        (choice.get("delta") or choice.get("message") or {}).get("content") or choice.get("text") or ""
        for choice in choices
    ]
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason") is not None]
    described = [choice["telltale"] for choice in choices if "telltale" in choice]
    return Said(answer.status_code, answer.headers, "".join(parts), reasons, described)


def trigger_of(tiny: TinyModel) -> dict[str, Any]:
    """Every token of the reply is the trigger, whatever stands before."""
    return {"logit_bias": {str(tiny.trigger): 100}}
