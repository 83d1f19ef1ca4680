"""Hold-back: tokens leave in order and unchanged, late by k scored positions; a block drops those that wait."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from serving.engine.holdback import BLOCKED, HoldBack

PROMPT = 10


def output(name: str, *tokens: int, finish: FinishReason | None = None, **settings: Any) -> EngineCoreOutput:
    return EngineCoreOutput(request_id=name, new_token_ids=list(tokens), finish_reason=finish, **settings)


def tokens_of(outputs: list[EngineCoreOutput]) -> list[list[int]]:
    return [list(item.new_token_ids) for item in outputs]


class Stream:
    """A request whose every step computes the token that the step before sampled, as an engine does."""

    def __init__(self, box: HoldBack, name: str, depth: int) -> None:
        self.box, self.name, self.scored = box, name, PROMPT
        box.begin(name, depth=depth, num_prompt=PROMPT)

    def step(self, *tokens: int, finish: FinishReason | None = None, **settings: Any) -> list[EngineCoreOutput]:
        released = self.box.pass_through(output(self.name, *tokens, finish=finish, **settings), scored=self.scored)
        self.scored += len(tokens)
        return released


@pytest.mark.covers("streaming", "no token leaks")
@given(
    length=st.integers(1, 30), depth=st.integers(0, 12), widths=st.lists(st.integers(1, 4), min_size=30, max_size=30)
)
def test_a_token_leaves_once_k_positions_from_it_on_are_scored(length: int, depth: int, widths: list[int]) -> None:
    """Against the definition: the token at p leaves when all positions up to p + k - 1 have been scored."""
    stream = Stream(HoldBack(), "a", depth)
    sent, left, position = [], [], PROMPT
    for number in range(length):
        scored = stream.scored
        tokens = tuple(range(position, position + widths[number]))
        position += widths[number]
        sent.append(tokens)
        left += [tuple(item.new_token_ids) for item in stream.step(*tokens)]
        expected = [tokens for tokens in sent if depth == 0 or tokens[-1] + depth - 1 < scored]
        assert left == expected
    left += [tuple(item.new_token_ids) for item in stream.step(position, finish=FinishReason.STOP)]
    assert left == [*sent, (position,)]


@pytest.mark.covers("several requests at once", "isolation")
@given(order=st.lists(st.sampled_from("abc"), min_size=1, max_size=40), depth=st.integers(0, 3))
def test_requests_do_not_mix_and_outputs_stay_the_same_objects(order: list[str], depth: int) -> None:
    box = HoldBack()
    streams = {name: Stream(box, name, depth) for name in "abc"}
    sent: dict[str, list[EngineCoreOutput]] = {name: [] for name in "abc"}
    left: dict[str, list[EngineCoreOutput]] = {name: [] for name in "abc"}
    for number, name in enumerate(order):
        item = output(name, number)
        sent[name].append(item)
        left[name] += box.pass_through(item, scored=streams[name].scored)
        streams[name].scored += 1
    for name in "abc":
        item = output(name, finish=FinishReason.LENGTH)
        left[name] += box.pass_through(item, scored=streams[name].scored)
        assert all(one is other for one, other in zip(left[name], [*sent[name], item], strict=True))


def test_a_natural_finish_lets_everything_out() -> None:
    stream = Stream(HoldBack(), "a", 1)
    assert stream.step(1) == []
    assert tokens_of(stream.step(2)) == [[1]]
    assert tokens_of(stream.step(3, finish=FinishReason.LENGTH)) == [[2], [3]]


@pytest.mark.covers("streaming", "no token leaks")
def test_a_block_drops_what_waits_and_keeps_what_rode_on_it() -> None:
    stats = PrefillStats()
    first, second = (EngineCoreEvent(kind, 1.0) for kind in (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED))
    prompt_logprobs: Any = ("prompt", "logprobs")
    stream = Stream(HoldBack(), "a", 3)
    assert stream.step(7, prefill_stats=stats, events=[first], new_prompt_logprobs_tensors=prompt_logprobs) == []
    assert stream.step(8) == []
    (released,) = stream.step(finish=FinishReason.STOP, stop_reason=BLOCKED, events=[second])
    assert released.new_token_ids == []
    assert released.prefill_stats is stats
    assert released.events == [first, second]
    assert released.new_prompt_logprobs_tensors is prompt_logprobs


def test_a_block_keeps_its_own_and_leaves_nothing_behind() -> None:
    box = HoldBack()
    stream = Stream(box, "a", 1)
    stream.step(7)
    own = PrefillStats()
    (final,) = stream.step(finish=FinishReason.STOP, stop_reason=BLOCKED, prefill_stats=own)
    assert final.prefill_stats is own
    assert final.events is None
    again = Stream(box, "a", 1)
    assert tokens_of(again.step(8, finish=FinishReason.STOP)) == [[8]]


def test_a_block_without_a_held_token() -> None:
    """A prompt that is refused, or a policy that holds nothing back."""
    for depth in (0, 1):
        (final,) = Stream(HoldBack(), "a", depth).step(finish=FinishReason.STOP, stop_reason=BLOCKED)
        assert final.stop_reason == BLOCKED


def test_a_stop_reason_that_is_not_the_mark_is_no_block() -> None:
    stream = Stream(HoldBack(), "a", 1)
    stream.step(1)
    assert tokens_of(stream.step(2, finish=FinishReason.STOP, stop_reason="another")) == [[1], [2]]


@pytest.mark.covers("abort", "no token leaks")
def test_an_abort_drops_what_was_held() -> None:
    box = HoldBack()
    first, second = Stream(box, "a", 1), Stream(box, "b", 1)
    first.step(1)
    second.step(1)
    box.drop("a")
    box.drop("nobody")
    assert tokens_of(first.step(2, finish=FinishReason.ABORT)) == [[2]]
    assert tokens_of(second.step(2, finish=FinishReason.STOP)) == [[1], [2]]
