"""Chat and text completions as our clients see them: the ``telltale`` object in each choice, refusals unmixed.

vLLM builds the responses. What is added here is added to its finished objects and events.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from serving.engine.frontend import CONTENT_FILTER, record_of, refusal_delta
from serving.engine.records import Record

FIELD = "telltale"
_DATA = "data: "


class StreamDresser:
    """One streamed response: joins what vLLM sends with the records behind its choices.

    Args:
        unmix: keep a refusal out of the text that reasoning and tool parsers read, and send it as content of its own.
    """

    def __init__(self, *, unmix: bool) -> None:
        self._unmix = unmix
        self._finished: dict[int, Record] = {}
        self._refusals: dict[int, str] = {}
        self._first: dict[str, Any] | None = None

    def note(self, index: int, output: Any) -> None:
        """See an output before vLLM makes an event of it."""
        record = record_of(output)
        if record is None or output.finish_reason is None:
            return
        self._finished[index] = record
        if self._unmix and output.finish_reason == CONTENT_FILTER and record.blocked_text is not None:
            for shown in (refusal_delta(record.blocked_text, follows_text=after) for after in (True, False)):
                if output.text.endswith(shown):
                    output.text = output.text.removesuffix(shown)
                    self._refusals[index] = shown
                    break

    def dress(self, event: str) -> Iterator[str]:
        """The events to send in the place of one of vLLM's."""
        if self._first is None and event.startswith(_DATA) and '"choices"' in event:
            self._first = json.loads(event.removeprefix(_DATA))
        if not self._finished:
            yield event
            return
        body = event.removeprefix(_DATA).strip()
        chunk = json.loads(body) if body.startswith("{") else {}
        choices = chunk.get("choices")
        if not choices:  # the usage event or [DONE]: whatever vLLM left unfinished is finished now
            yield from self._finish_missing()
            yield event
            return
        for choice in choices:
            index = choice.get("index", 0)
            if choice.get("finish_reason") is None or index not in self._finished:
                continue
            if index in self._refusals and choice.get("delta"):
                # A parser lets out at the end what it still had: that was said before the refusal.
                yield _event({**chunk, "choices": [{**choice, "finish_reason": None}]})
                choice["delta"] = {}
                for said in ("token_ids", "logprobs"):
                    choice.pop(said, None)
            yield from self._refusal(index)
            choice[FIELD] = self._finished.pop(index).describe()
        yield _event(chunk)

    def _finish_missing(self) -> Iterator[str]:
        for index in sorted(self._finished):
            yield from self._refusal(index)
            record = self._finished.pop(index)
            if record.blocked_text is not None:
                final = {"index": index, "delta": {}, "finish_reason": CONTENT_FILTER, FIELD: record.describe()}
                yield _event({**(self._first or {}), "choices": [final]})

    def _refusal(self, index: int) -> Iterator[str]:
        text = self._refusals.pop(index, None)
        if text is not None:
            choice = {"index": index, "delta": {"content": text}, "finish_reason": None}
            yield _event({**(self._first or {}), "choices": [choice]})


def chat_stream(original: Callable[..., AsyncGenerator[str, None]]) -> Callable[..., AsyncGenerator[str, None]]:
    """Wrap ``OpenAIServingChat.chat_completion_stream_generator``."""

    async def chat_completion_stream_generator(
        self: Any, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        dresser = StreamDresser(unmix=self.parser_cls is not None)

        async def watched() -> AsyncGenerator[Any, None]:
            async for result in result_generator:
                for output in result.outputs:
                    dresser.note(output.index, output)
                yield result

        async with aclosing(original(self, request, watched(), *args, **kwargs)) as events:
            async for event in events:
                for dressed in dresser.dress(event):
                    yield dressed

    return chat_completion_stream_generator


def completion_stream(original: Callable[..., AsyncGenerator[str, None]]) -> Callable[..., AsyncGenerator[str, None]]:
    """Wrap ``OpenAIServingCompletion.completion_stream_generator``."""

    async def completion_stream_generator(
        self: Any, request: Any, engine_inputs: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        dresser = StreamDresser(unmix=False)
        per_prompt = request.n or 1

        async def watched() -> AsyncGenerator[Any, None]:
            async for prompt, result in result_generator:
                for output in result.outputs:
                    dresser.note(output.index + prompt * per_prompt, output)
                yield prompt, result

        async with aclosing(original(self, request, engine_inputs, watched(), *args, **kwargs)) as events:
            async for event in events:
                for dressed in dresser.dress(event):
                    yield dressed

    return completion_stream_generator


def chat_full(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``OpenAIServingChat.chat_completion_full_generator``."""

    async def chat_completion_full_generator(
        self: Any, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> Any:
        outputs: dict[int, Any] = {}

        async def watched() -> AsyncGenerator[Any, None]:
            async for result in result_generator:
                outputs.update({output.index: output for output in result.outputs})
                yield result

        response = await original(self, request, watched(), *args, **kwargs)
        for choice in getattr(response, "choices", ()):
            record = _dress_choice(choice, outputs.get(choice.index))
            if record is not None and record.blocked_text is not None:
                message = choice.message
                choice.message = type(message)(role=message.role, content=record.blocked_text)
        return response

    return chat_completion_full_generator


def completion_full(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``OpenAIServingCompletion.request_output_to_completion_response``."""

    def request_output_to_completion_response(self: Any, final_res_batch: Any, *args: Any, **kwargs: Any) -> Any:
        response = original(self, final_res_batch, *args, **kwargs)
        outputs: Iterable[Any] = (output for result in final_res_batch for output in result.outputs)
        for choice, output in zip(response.choices, outputs, strict=True):
            _dress_choice(choice, output)
        return response

    return request_output_to_completion_response


def _dress_choice(choice: Any, output: Any) -> Record | None:
    record = record_of(output)
    if record is None:
        return None
    setattr(choice, FIELD, record.describe())
    if record.blocked_text is not None:
        # The tokens behind the refusal are what was withheld: nothing may spell them.
        choice.finish_reason, choice.stop_reason = CONTENT_FILTER, None
        choice.logprobs = choice.token_ids = choice.routed_experts = None
    return record


def _event(chunk: dict[str, Any]) -> str:
    return f"{_DATA}{json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
