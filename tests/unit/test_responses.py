"""Replies as clients get them: the telltale object in the finish chunk, refusals apart, no stream without an end."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatMessage
from vllm.outputs import CompletionOutput

from monitor.policy import Plan
from monitor.report import Decided
from monitor.types import ActionCode
from serving.engine.frontend import CONTENT_FILTER, RECORD, refusal_delta
from serving.engine.records import Record
from serving.engine.responses import StreamDresser, chat_full, chat_stream, completion_full, completion_stream
from tests.unit.artifacts import make_card, plan_of, policy_text, rule, unit_artifact

REFUSAL = "I can't help with that."


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    text = policy_text(rule("stop", stage="stream", when="aggregate: {kind: max}, above: {value: 2.0}"))
    return plan_of(tmp_path_factory.mktemp("plan"), text, {"harm": unit_artifact(make_card())})


def record(plan: Plan, *, blocked: bool = False) -> Record:
    made = Record(plan)
    if blocked:
        made.decided = Decided(int(ActionCode.BLOCK), "stop", REFUSAL)
    return made


def output(made: Record | None, text: str = "", *, finish: str | None = None, index: int = 0) -> CompletionOutput:
    item = CompletionOutput(index, text, [], None, None, finish_reason=finish)
    if made is not None:
        setattr(item, RECORD, made)
    return item


def event(
    delta: dict[str, Any] | None = None,
    *,
    finish: str | None = None,
    index: int = 0,
    token_ids: Any = None,
    **more: Any,
) -> str:
    choice: dict[str, Any] = {"index": index, "delta": delta or {}, "finish_reason": finish}
    if token_ids is not None:
        choice |= {"token_ids": token_ids, "logprobs": {"content": [{"token": str(token)} for token in token_ids]}}
    return "data: " + json.dumps({"id": "chat-1", "model": "m", "choices": [choice], **more}) + "\n\n"


USAGE = 'data: {"id": "chat-1", "choices": [], "usage": {"total_tokens": 3}}\n\n'
DONE = "data: [DONE]\n\n"


def chunks(events: Iterable[str]) -> list[dict[str, Any]]:
    bodies = [item.removeprefix("data: ").strip() for item in events]
    assert all(item.endswith("\n\n") and item.startswith("data: ") for item in events)
    return [json.loads(body) for body in bodies if body != "[DONE]"]


def choices(events: Iterable[str]) -> list[dict[str, Any]]:
    return [choice for chunk in chunks(list(events)) for choice in chunk["choices"]]


def said(events: Iterable[str]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in choices(list(events)))


def dressed(dresser: StreamDresser, events: Iterable[str]) -> list[str]:
    return [out for item in events for out in dresser.dress(item)]


def test_only_the_finish_chunk_gets_the_object(plan: Plan) -> None:
    dresser = StreamDresser(unmix=False)
    made = record(plan)
    before = [event({"role": "assistant"}), event({"content": "Hi"})]
    dresser.note(0, output(made, "Hi"))
    assert dressed(dresser, before) == before  # byte for byte as vLLM made them
    dresser.note(0, output(made, "!", finish="stop"))
    after = dressed(dresser, [event({"content": "!"}, finish="stop"), USAGE, DONE])
    assert choices(after) == [
        {"index": 0, "delta": {"content": "!"}, "finish_reason": "stop", "telltale": made.describe()}
    ]
    assert after[-2:] == [USAGE, DONE]


def test_each_choice_has_its_own(plan: Plan) -> None:
    dresser = StreamDresser(unmix=False)
    allowed, blocked = record(plan), record(plan, blocked=True)
    dresser.note(1, output(blocked, REFUSAL, finish=CONTENT_FILTER, index=1))
    first = dressed(
        dresser, [event({"content": "a"}, index=0), event({"content": REFUSAL}, finish=CONTENT_FILTER, index=1)]
    )
    dresser.note(0, output(allowed, "", finish="length"))
    second = dressed(dresser, [event({}, finish="length"), DONE])
    finals = [choice for choice in choices(first + second) if choice["finish_reason"]]
    assert [(choice["index"], choice["telltale"]["action"]) for choice in finals] == [(1, "block"), (0, "allow")]
    assert "telltale" not in choices(first)[0]


@pytest.mark.parametrize("follows_text", [False, True])
def test_a_parser_never_reads_the_refusal(plan: Plan, follows_text: bool) -> None:
    dresser = StreamDresser(unmix=True)
    final = output(
        record(plan, blocked=True), "left" + refusal_delta(REFUSAL, follows_text=follows_text), finish=CONTENT_FILTER
    )
    dressed(dresser, [event({"role": "assistant"})])
    dresser.note(0, final)
    assert final.text == "left"
    events = dressed(dresser, [event({}, finish=CONTENT_FILTER), DONE])
    assert said(events) == refusal_delta(REFUSAL, follows_text=follows_text)
    assert [choice["finish_reason"] for choice in choices(events)] == [None, CONTENT_FILTER]
    assert all(chunk["id"] == "chat-1" and chunk["model"] == "m" for chunk in chunks(events[:-1]))


def test_what_a_parser_lets_out_at_the_end_comes_before_the_refusal(plan: Plan) -> None:
    dresser = StreamDresser(unmix=True)
    dressed(dresser, [event({"role": "assistant"})])
    dresser.note(
        0, output(record(plan, blocked=True), refusal_delta(REFUSAL, follows_text=True), finish=CONTENT_FILTER)
    )
    # A slow reader's last event holds several tokens: each is said once.
    events = dressed(dresser, [event({"content": "tail"}, finish=CONTENT_FILTER, token_ids=[5, 6]), DONE])
    assert said(events) == f"tail\n\n{REFUSAL}"
    assert [choice.get("token_ids") for choice in choices(events)] == [[5, 6], None, None]
    assert [bool(choice.get("logprobs")) for choice in choices(events)] == [True, False, False]
    assert [choice["finish_reason"] for choice in choices(events)] == [None, None, CONTENT_FILTER]
    assert ["telltale" in choice for choice in choices(events)] == [False, False, True]


def test_without_a_parser_the_text_is_left_alone(plan: Plan) -> None:
    dresser = StreamDresser(unmix=False)
    final = output(record(plan, blocked=True), REFUSAL, finish=CONTENT_FILTER)
    dresser.note(0, final)
    assert final.text == REFUSAL
    assert said(dressed(dresser, [event({"content": REFUSAL}, finish=CONTENT_FILTER)])) == REFUSAL


@pytest.mark.parametrize("last", [[DONE], [USAGE, DONE]])
def test_a_finish_chunk_that_vllm_dropped_is_sent(plan: Plan, last: list[str]) -> None:
    """A block at the prompt has no tokens and, once unmixed, no text: vLLM takes it for an unfinished prefill."""
    dresser = StreamDresser(unmix=True)
    dressed(dresser, [event({"role": "assistant", "content": ""})])
    dresser.note(0, output(record(plan, blocked=True), REFUSAL, finish=CONTENT_FILTER))
    events = dressed(dresser, last)
    assert events[-len(last) :] == last
    assert said(events) == REFUSAL
    final = choices(events)[-1]
    assert (final["finish_reason"], final["telltale"]["rule"]) == (CONTENT_FILTER, "stop")
    assert sum(choice["finish_reason"] is not None for choice in choices(events)) == 1


def test_an_output_without_a_record_changes_nothing(plan: Plan) -> None:
    dresser = StreamDresser(unmix=True)
    dresser.note(0, output(None, "x", finish="stop"))
    given = [event({"content": "x"}, finish="stop"), DONE]
    assert dressed(dresser, given) == given


class Stream:
    """Stands in for vLLM's generators: reads results, makes an event of each output, knows when it was closed."""

    def __init__(self) -> None:
        self.parser_cls = None
        self.closed = False

    async def events(self, request: Any, results: AsyncIterator[Any]) -> AsyncGenerator[str, None]:
        try:
            yield event({"role": "assistant"})
            async for result in results:
                for item in result.outputs:
                    yield event({"content": item.text}, finish=item.finish_reason, index=item.index)
            yield DONE
        finally:
            self.closed = True

    async def completion_events(
        self, request: Any, inputs: Any, results: AsyncIterator[tuple[int, Any]]
    ) -> AsyncGenerator[str, None]:
        async for prompt, result in results:
            for item in result.outputs:
                yield event(
                    {"content": item.text}, finish=item.finish_reason, index=item.index + prompt * (request.n or 1)
                )
        yield DONE


async def results_of(*outputs: CompletionOutput) -> AsyncGenerator[Any, None]:
    for item in outputs:
        yield SimpleNamespace(outputs=[item])


async def test_a_chat_stream(plan: Plan) -> None:
    stream = Stream()
    made = record(plan, blocked=True)
    results = results_of(output(made, "Hi"), output(made, REFUSAL, finish=CONTENT_FILTER))
    events = [item async for item in chat_stream(Stream.events)(stream, None, results)]
    assert said(events) == f"Hi{REFUSAL}"
    assert choices(events)[-1]["telltale"]["action"] == "block"
    assert events[-1] == DONE
    assert stream.closed


async def test_a_client_that_leaves_closes_the_stream(plan: Plan) -> None:
    stream = Stream()
    events = chat_stream(Stream.events)(stream, None, results_of(output(record(plan), "Hi")))
    assert await anext(events) == event({"role": "assistant"})
    await events.aclose()
    assert stream.closed


async def test_a_completion_stream_counts_choices_over_prompts(plan: Plan) -> None:
    made = [record(plan), record(plan, blocked=True)]

    async def results() -> AsyncGenerator[tuple[int, Any], None]:
        yield 1, SimpleNamespace(outputs=[output(made[1], "b", finish=CONTENT_FILTER, index=1)])
        yield 0, SimpleNamespace(outputs=[output(made[0], "a", finish="stop", index=0)])

    wrapped = completion_stream(Stream.completion_events)
    events = [item async for item in wrapped(Stream(), SimpleNamespace(n=2), None, results())]
    assert [(choice["index"], choice["telltale"]["action"]) for choice in choices(events)] == [
        (3, "block"),
        (0, "allow"),
    ]


async def test_a_blocked_reply_is_the_refusal_alone(plan: Plan) -> None:
    """No tool call, no reasoning, no token and no logprob of what was withheld."""
    message = ChatMessage(role="assistant", content=REFUSAL, reasoning="how to")
    choice = SimpleNamespace(index=1, message=message, finish_reason="stop", stop_reason="telltale:blocked")
    choice.logprobs, choice.token_ids, choice.routed_experts = ["lp"], [1], "rows"
    allowed = SimpleNamespace(
        index=0, message=ChatMessage(role="assistant", content="fine"), finish_reason="stop", logprobs=["lp"]
    )
    response = SimpleNamespace(choices=[allowed, choice])

    async def generator(self: Any, request: Any, results: AsyncIterator[Any]) -> Any:
        async for _ in results:
            pass
        return response

    outputs = results_of(
        output(record(plan), "fine", finish="stop"), output(record(plan, blocked=True), REFUSAL, index=1)
    )
    await chat_full(generator)(None, None, outputs)
    assert choice.message.content == REFUSAL
    assert choice.message.reasoning is None
    assert (choice.finish_reason, choice.stop_reason) == (CONTENT_FILTER, None)
    assert choice.logprobs is choice.token_ids is choice.routed_experts is None
    assert choice.telltale["action"] == "block"
    assert (allowed.message.content, allowed.logprobs, allowed.telltale["action"]) == ("fine", ["lp"], "allow")


def test_a_text_completion_is_dressed_choice_by_choice(plan: Plan, tmp_path: Path) -> None:
    made = [
        SimpleNamespace(finish_reason="stop", stop_reason=None, logprobs="lp", token_ids=[1], routed_experts=None)
    ] * 1
    made.append(
        SimpleNamespace(finish_reason="stop", stop_reason="x", logprobs="lp", token_ids=[1], routed_experts=None)
    )
    results = [
        SimpleNamespace(outputs=[output(record(plan))]),
        SimpleNamespace(outputs=[output(record(plan, blocked=True))]),
    ]
    response = completion_full(lambda self, batch: SimpleNamespace(choices=made))(None, results)
    assert [choice.telltale["action"] for choice in response.choices] == ["allow", "block"]
    assert [(choice.finish_reason, choice.logprobs) for choice in made] == [("stop", "lp"), (CONTENT_FILTER, None)]
