"""Chat templates of several families, each with its rules written a second time as a plain function.

The function gives the pieces of a rendered conversation with the role of each, in order: what a map must say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from monitor.types import Role

Piece = tuple[Role, str]
Messages = Sequence[dict[str, Any]]
ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<|begin_of_text|>{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "<start_of_turn>{{ role }}\n{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}"
    "{% if not (tools and loop.first) %}<|im_start|>system\n{{ message.content }}<|im_end|>\n{% endif %}"
    "{% elif message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    '{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% elif message.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ message.content }}\n</tool_response>"
    "<|im_end|>\n{% else %}<|im_start|>user\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(text: str) -> Piece:
    return Role.TEMPLATE, text


def chatml(messages: Messages, tools: Any, reply: bool) -> list[Piece]:
    pieces = []
    for message in messages:
        pieces += [template(f"<|im_start|>{message['role']}\n")]
        pieces += [(ROLES[message["role"]], message["content"]), template("<|im_end|>\n")]
    return [*pieces, template("<|im_start|>assistant\n")] if reply else pieces


def smollm(messages: Messages, tools: Any, reply: bool) -> list[Piece]:
    default = [template(f"<|im_start|>system\n{SMOL_SYSTEM}<|im_end|>\n")]
    return (default if messages[0]["role"] != "system" else []) + chatml(messages, tools, reply)


def llama(messages: Messages, tools: Any, reply: bool) -> list[Piece]:
    pieces = [template("<|begin_of_text|>")]
    for message in messages:
        pieces += [template(f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n")]
        pieces += [(ROLES[message["role"]], message["content"].strip()), template("<|eot_id|>")]
    return [*pieces, template("<|start_header_id|>assistant<|end_header_id|>\n\n")] if reply else pieces


def gemma(messages: Messages, tools: Any, reply: bool) -> list[Piece]:
    pieces = [template("<bos>")]
    for message in messages:
        name = "model" if message["role"] == "assistant" else message["role"]
        pieces += [template(f"<start_of_turn>{name}\n"), (ROLES[message["role"]], message["content"].strip())]
        pieces += [template("<end_of_turn>\n")]
    return [*pieces, template("<start_of_turn>model\n")] if reply else pieces


def qwen(messages: Messages, tools: Any, reply: bool) -> list[Piece]:
    pieces = []
    if tools:
        pieces += [template("<|im_start|>system\n")]
        if messages[0]["role"] == "system":
            pieces += [(Role.SYSTEM, messages[0]["content"]), template("\n\n")]
        pieces += [template("# Tools\n")]
        for tool in tools:
            # Words and identifiers are the template's; a description is what the operator says.
            before, after = json.dumps(tool, ensure_ascii=False).split(tool["description"])
            pieces += [template(before), (Role.SYSTEM, tool["description"]), template(f"{after}\n")]
        pieces += [template("<|im_end|>\n")]
    for number, message in enumerate(messages):
        content = message.get("content") or ""
        match message["role"]:
            case "system" if tools and number == 0:
                pass
            case "assistant":
                pieces += [template("<|im_start|>assistant\n")]
                if message.get("reasoning_content"):
                    pieces += [template("<think>\n"), (Role.REASONING, message["reasoning_content"])]
                    pieces += [template("\n</think>\n\n")]
                pieces += [(Role.ASSISTANT, content)]
                for call in message.get("tool_calls", []):
                    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                    pieces += [template('\n<tool_call>\n{"name": "'), (Role.ASSISTANT, call["function"]["name"])]
                    pieces += [template('", "arguments": {"'), (Role.ASSISTANT, arguments[2:-2])]
                    pieces += [template('"}}\n</tool_call>')]
                pieces += [template("<|im_end|>\n")]
            case "tool":
                pieces += [template("<|im_start|>user\n<tool_response>\n"), (Role.TOOL, content)]
                pieces += [template("\n</tool_response><|im_end|>\n")]
            case role:
                pieces += [template(f"<|im_start|>{role}\n"), (ROLES[role], content), template("<|im_end|>\n")]
    return [*pieces, template("<|im_start|>assistant\n")] if reply else pieces


@dataclass(frozen=True)
class Family:
    """A template and its rules.

    Attributes:
        text: the template; None for the tokenizer's own.
        pieces: (messages, tools, with a generation prompt) -> pieces.
        roles: of the messages that it takes.
        tools: whether it prints tools, tool calls and reasoning.
    """

    text: str | None
    pieces: Callable[[Messages, Any, bool], list[Piece]]
    roles: tuple[str, ...] = ("system", "user", "assistant", "tool")
    tools: bool = False


FAMILIES = {
    "smollm2": Family(None, smollm),
    "chatml": Family(CHATML, chatml),
    "llama": Family(LLAMA, llama),
    "gemma": Family(GEMMA, gemma, roles=("user", "assistant")),
    "qwen": Family(QWEN, qwen, tools=True),
}
