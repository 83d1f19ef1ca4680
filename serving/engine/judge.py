"""Asks the served model itself what it makes of a text: one question, answered yes or no, seen by nobody else."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Sequence
from typing import Any

import structlog
from vllm.exceptions import VLLMError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from monitor.destination import TEXT_FIELD
from probes.errors import TelltaleError
from serving.engine.frontend import Frontend

log = structlog.get_logger(__name__)

YES, NO = "yes", "no"
_MAX_TOKENS = 8
_AT_ONCE = 8
"""Questions that are with the engine at a time: users' requests come first."""


class JudgeError(TelltaleError, RuntimeError):
    """The model gave no answer."""


class EngineJudge:
    """Asks the engine of this API process.

    The text stands between two marks that are drawn anew for each question, so that it cannot write its own end; and
    its tokens are made of it alone, so that nothing in it becomes a special token such as the end of a turn.

    Args:
        engine: vLLM's ``AsyncLLM``.
        frontend: of this process; its signature says that a question is ours.
        tokenizer: of the engine.
    """

    def __init__(self, engine: Any, frontend: Frontend, tokenizer: Any) -> None:
        self._engine = engine
        self._frontend = frontend
        self._tokenizer = tokenizer
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def flags(self, question: str, text: str) -> bool:
        """Whether the model answers yes.

        Args:
            question: with ``{text}`` where the text goes.
            text: that is to be judged.
        Raises:
            JudgeError: it does not answer, for instance because the text is too long for it.
        """
        tokens = self.tokens(question, text)
        params = SamplingParams(
            max_tokens=_MAX_TOKENS,
            temperature=0.0,
            structured_outputs=StructuredOutputsParams(choice=[YES, NO]),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with self._slots:
            answer = await self._answer(tokens, params)
        if answer not in {YES, NO}:
            raise JudgeError(f"the model's answer is neither {YES!r} nor {NO!r}")
        return answer == YES

    def tokens(self, question: str, text: str) -> list[int]:
        """The prompt of a question."""
        mark = secrets.token_hex(8)
        asked = question.replace(TEXT_FIELD, f"\n<text-{mark}>\n{mark}\n</text-{mark}>\n")
        if getattr(self._tokenizer, "chat_template", None):
            asked = str(
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=False
                )
            )
        before, after = asked.split(f"\n{mark}\n")
        return [
            *self._encoded(f"{before}\n"),
            *self._encoded(text, split_special_tokens=True),
            *self._encoded(f"\n{after}"),
        ]

    def _encoded(self, text: str, **settings: bool) -> Sequence[int]:
        found: Sequence[int] = self._tokenizer.encode(text, add_special_tokens=False, **settings)
        return found

    async def _answer(self, tokens: list[int], params: SamplingParams) -> str:
        request_id = f"telltale-judge-{uuid.uuid4().hex}"
        self._frontend.questions.add(request_id)
        try:
            # The salt keeps its blocks apart: what was said about a text is in no other request's cache.
            prompt = tokens_input(prompt_token_ids=tokens, cache_salt=request_id)
            text = ""
            async for output in self._engine.generate(prompt, params, request_id):
                text = output.outputs[0].text
        except (VLLMError, ValueError, RuntimeError) as error:
            raise JudgeError(f"the model could not be asked ({type(error).__name__}): {error}") from error
        finally:
            self._frontend.questions.discard(request_id)
        return text.strip()
