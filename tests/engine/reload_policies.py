"""Policies that a running server is given one after the other, and what they do to a prompt with the trigger."""

from __future__ import annotations

import hashlib

KEY = "sk-operator"
TRIGGER_PROMPT = "when: {detector: trigger, stage: prompt}"
TRIGGER_STREAM = "when: {detector: trigger, stage: stream}"
BLOCK = "Not under the first policy."


def policy(
    *rules: str,
    detectors: tuple[str, ...] = ("trigger",),
    directions: int = 4,
    tail: str = "",
    key: str = KEY,
) -> str:
    """A policy file of these rules over artifacts in the same folder."""
    entries = "\n".join(f"  - artifact: {name}.safetensors" for name in detectors)
    lines = "\n".join(f"      - {rule}" for rule in rules)
    return f"""\
version: "1"
detectors:
{entries}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    hold_back: 1
    expose: scores
    rules:
{lines}
reserve: {{directions: {directions}}}
access: {{keys: [{{name: operators, key_sha256: {hashlib.sha256(key.encode()).hexdigest()}, scopes: [admin]}}]}}
{tail}"""


BLOCKING = policy(f'{{name: stop, {TRIGGER_PROMPT}, do: {{action: block, text: "{BLOCK}"}}, mode: enforce}}')
FLAGGING = policy(f"{{name: note, {TRIGGER_PROMPT}, do: {{action: flag}}, mode: enforce}}")
CUTTING = policy(f'{{name: cut, {TRIGGER_STREAM}, do: {{action: block, text: "Cut."}}, mode: enforce}}')
