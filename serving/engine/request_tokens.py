"""From lines of a file to tokens with roles, as the server's own routes make them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMClientError
from vllm.renderers.base import BaseRenderer

from monitor.segments import PromptMap
from monitor.types import Role
from probes.card import Format
from probes.fit.reading.activation_manifest import TokenPositions
from probes.fit.reading.activation_store import RequestRecord
from probes.fit.reading.activation_writer import PreparedRequest
from probes.fit.rows.prompt_file import PromptFile, PromptFileError, PromptLine
from serving.engine.kept_tokens import UNKNOWN_ROLE, KeptTokensError, kept_tokens, needs_response
from serving.engine.rendering import render_chat_async
from serving.origin import Origin, enter_origin, leave_origin

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_render_chat = render_chat_async(BaseRenderer.render_chat_async)
"""What ``/v1/chat/completions`` calls in a monitored server."""
_AT_ONCE = 32
"""Lines that wait for the renderer's thread together."""
Prompt = tuple[list[int], PromptMap]
"""Tokens, and who wrote them."""


class RequestTokens:
    """Makes tokens of the lines of a file.

    A prompt has the tokens and the roles that the server gives it. A reply's tokens stand behind the generation prompt,
    as generated ones would: they are tokenised apart, so that no token reaches over the border.

    Args:
        config: vLLM's, finished.
        renderer: of the engine.
        text_format: chat or raw.
        positions: which tokens are kept.
    """

    def __init__(
        self, config: VllmConfig, renderer: BaseRenderer[Any], *, text_format: Format, positions: TokenPositions
    ) -> None:
        self._model = config.model_config
        self._renderer = renderer
        self._format = text_format
        self._positions = positions

    def prepare(self, file: PromptFile, *, first: int = 0) -> Iterator[PreparedRequest]:
        """The requests of a file, in order, one at a time.

        Args:
            file: of prompts.
            first: how many lines to leave out at the beginning.
        Raises:
            PromptFileError: a line cannot be rendered, is too long, or has none of the tokens; names the line.
        """
        lines = file.lines(first)
        with asyncio.Runner() as runner:
            while some := list(islice(lines, _AT_ONCE)):
                for line, found in zip(some, runner.run(self._prompts(some)), strict=True):
                    yield self._prepare(file.path, line, found)

    async def _prompts(self, lines: Sequence[PromptLine]) -> list[Prompt | BaseException]:
        render = self._chat if self._format is Format.CHAT else self._raw
        return await asyncio.gather(*(render(line) for line in lines), return_exceptions=True)

    def _prepare(self, path: Path, line: PromptLine, found: Prompt | BaseException) -> PreparedRequest:
        try:
            if isinstance(found, BaseException):
                raise found
            tokens, prompt = found
            num_prompt, codes = len(tokens), prompt.codes(len(tokens))
            if not num_prompt:
                raise KeptTokensError("its prompt becomes no token.")
            if line.response is not None and needs_response(self._positions):
                tokens += self._renderer.get_tokenizer().encode(line.response, add_special_tokens=False)
            kept = kept_tokens(self._positions, codes, num_prompt=num_prompt, num_tokens=len(tokens))
        except (ValueError, VLLMClientError) as error:
            raise PromptFileError(
                f"{path}:{line.number}: {_reason(error)} Correct this line, or leave it out."
            ) from error
        if len(tokens) >= self._model.max_model_len:
            raise PromptFileError(
                f"{path}:{line.number}: has {len(tokens)} tokens; this engine takes at most "
                f"{self._model.max_model_len - 1}. Shorten it, leave it out, or raise --max-model-len."
            )
        roles = np.full(len(tokens), Role.ASSISTANT.code, dtype=np.uint8)
        roles[:num_prompt] = UNKNOWN_ROLE if codes is None else codes
        record = RequestRecord(
            line=line.number, num_prompt=num_prompt, num_tokens=len(tokens), fields=dict(line.fields)
        )
        return PreparedRequest(record, tokens, roles, kept.start, kept.stop)

    async def _chat(self, line: PromptLine) -> Prompt:
        request = ChatCompletionRequest(messages=[dict(message) for message in line.messages])
        settings = request.build_chat_params(None, "auto").with_defaults({"tokenize": False})
        origin = Origin(Format.CHAT)
        before = enter_origin(origin)
        try:
            _, (engine_input,) = await _render_chat(
                self._renderer, [request.messages], settings, request.build_tok_params(self._model)
            )
        finally:
            leave_origin(before)
        tokens = list(engine_input["prompt_token_ids"])
        return tokens, origin.prompt_of(tokens)

    async def _raw(self, line: PromptLine) -> Prompt:
        settings = CompletionRequest(prompt=line.text).build_tok_params(self._model)
        (engine_input,) = await self._renderer.render_cmpl_async([{"prompt": line.text}], settings)
        tokens = list(engine_input["prompt_token_ids"])
        return tokens, PromptMap.raw(len(tokens))


def _reason(error: Exception) -> str:
    # pydantic's own text repeats what was given, which nobody wants to read in a log.
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}."
