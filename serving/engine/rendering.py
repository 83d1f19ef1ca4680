"""The place where vLLM renders chats: each one is rendered once more with marks, and what that tells is noted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from monitor.segments import PromptMap
from probes.card import Format
from serving.engine.marks import Message, trailing_from
from serving.engine.segments import TextMap, attempts, prompt_map, search
from serving.origin import current_origin

if TYPE_CHECKING:
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.params import ChatParams, TokenizeParams

log = structlog.get_logger(__name__)

SPECIAL = "telltale_special_ids"
"""Attribute of a renderer that holds the ids of its tokenizer's special tokens."""


def render_chat_async(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``BaseRenderer.render_chat_async``: every route with messages comes through it."""

    async def render_chat_async(
        self: BaseRenderer[Any],
        conversations: Sequence[Any],
        chat_params: ChatParams,
        tok_params: TokenizeParams | None = None,
        **kwargs: Any,
    ) -> Any:
        origin = current_origin()
        if origin.fmt is not Format.CHAT:
            return await original(self, conversations, chat_params, tok_params, **kwargs)
        asked = tok_params if tok_params is not None else self.default_chat_tok_params
        with_offsets = replace(asked, return_token_offsets=True)
        rendered, inputs = await original(self, conversations, chat_params, with_offsets, **kwargs)
        for messages, engine_input in zip(rendered, inputs, strict=True):
            prompt = await _map_chat(self, messages, chat_params, engine_input)
            if not asked.return_token_offsets:
                engine_input.pop("prompt_token_offsets", None)
            if prompt is not None:
                origin.note(engine_input["prompt_token_ids"], prompt)
        return rendered, inputs

    return render_chat_async


async def _map_chat(
    renderer: BaseRenderer[Any], messages: Sequence[Message], params: ChatParams, engine_input: Mapping[str, Any]
) -> PromptMap | None:
    token_ids = engine_input.get("prompt_token_ids")
    if token_ids is None:  # an encoder's input or embeddings: signing refuses them or calls them unknown
        return None
    settings = params.get_apply_chat_template_kwargs()
    text, offsets = engine_input.get("prompt"), engine_input.get("prompt_token_offsets")
    found: TextMap | None = None
    if isinstance(renderer, HfRenderer) and isinstance(text, str) and offsets is not None:
        found = await _map_text(renderer, messages, settings, text)
        found = found or search(messages, settings, text)
    return prompt_map(
        found,
        token_ids,
        offsets or (),
        special=_special_ids(renderer) if found is not None else (),
        reply_is_open=trailing_from(messages, settings) < len(messages),
    )


async def _map_text(
    renderer: HfRenderer, messages: Sequence[Message], settings: Mapping[str, Any], text: str
) -> TextMap | None:
    for attempt in attempts(messages, settings, text):
        try:
            marked = await renderer._render_with_timeout(
                renderer._apply_chat_template_async(
                    renderer.model_config, renderer.get_tokenizer(), attempt.messages, **attempt.settings
                )
            )
        except VLLMValidationError as error:
            # The template looks into what was marked here; the next attempt marks less.
            log.debug("the chat template refuses a marked conversation", error=str(error))
            continue
        found = attempt.read(marked, text) if isinstance(marked, str) else None
        if found is not None:
            return found
    return None


def _special_ids(renderer: BaseRenderer[Any]) -> frozenset[int]:
    known: frozenset[int] | None = getattr(renderer, SPECIAL, None)
    if known is None:
        added = renderer.get_tokenizer().added_tokens_decoder
        known = frozenset(number for number, token in added.items() if token.special)
        setattr(renderer, SPECIAL, known)
    return known
