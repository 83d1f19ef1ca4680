"""Hold-back: tokens leave in order and unchanged, one step late; a block drops the held token and nothing else."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import given
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from serving.engine.holdback import BLOCKED, HoldBack


def output(name: str, *tokens: int, finish: FinishReason | None = None, **settings: Any) -> EngineCoreOutput:
    return EngineCoreOutput(request_id=name, new_token_ids=list(tokens), finish_reason=finish, **settings)


def tokens_of(outputs: list[EngineCoreOutput]) -> list[list[int]]:
    return [list(item.new_token_ids) for item in outputs]


@given(
    streams=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 6), min_size=1),
    order=st.randoms(use_true_random=False),
    hold=st.booleans(),
)
def test_every_output_leaves_once_in_order_and_is_the_same_object(
    streams: dict[str, int], order: Any, hold: bool
) -> None:
    sent = {
        name: [output(name, at, finish=FinishReason.STOP if at == length - 1 else None) for at in range(length)]
        for name, length in streams.items()
    }
    left: dict[str, list[EngineCoreOutput]] = {name: [] for name in streams}
    waiting = {name: list(items) for name, items in sent.items()}
    box = HoldBack()
    while waiting:
        name = order.choice(sorted(waiting))
        item = waiting[name].pop(0)
        released = box.pass_through(item, hold=hold)
        assert all(entry.request_id == name for entry in released)
        left[name] += released
        # With hold-back, exactly the newest token of a live stream is inside.
        assert len(left[name]) == len(sent[name]) - len(waiting[name]) - (hold and item.finish_reason is None)
        if not waiting[name]:
            del waiting[name]
    for name, items in sent.items():
        assert all(one is other for one, other in zip(left[name], items, strict=True))


def test_a_natural_finish_lets_everything_out() -> None:
    box = HoldBack()
    assert box.pass_through(output("a", 1), hold=True) == []
    assert tokens_of(box.pass_through(output("a", 2), hold=True)) == [[1]]
    assert tokens_of(box.pass_through(output("a", 3, finish=FinishReason.LENGTH), hold=True)) == [[2], [3]]


def test_a_block_drops_the_held_token_and_keeps_what_rode_on_it() -> None:
    box = HoldBack()
    stats = PrefillStats()
    first, second = (EngineCoreEvent(kind, 1.0) for kind in (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED))
    prompt_logprobs: Any = ("prompt", "logprobs")
    held = output("a", 7, prefill_stats=stats, events=[first], new_prompt_logprobs_tensors=prompt_logprobs)
    assert box.pass_through(held, hold=True) == []
    final = output("a", finish=FinishReason.STOP, stop_reason=BLOCKED, events=[second])
    (released,) = box.pass_through(final, hold=True)
    assert released is final
    assert released.new_token_ids == []
    assert released.prefill_stats is stats
    assert released.events == [first, second]
    assert released.new_prompt_logprobs_tensors is prompt_logprobs


def test_a_block_keeps_its_own_and_leaves_nothing_behind() -> None:
    box = HoldBack()
    box.pass_through(output("a", 7), hold=True)
    own = PrefillStats()
    final = output("a", finish=FinishReason.STOP, stop_reason=BLOCKED, prefill_stats=own)
    assert box.pass_through(final, hold=True) == [final]
    assert final.prefill_stats is own
    assert final.events is None
    assert tokens_of(box.pass_through(output("a", 8, finish=FinishReason.STOP), hold=True)) == [[8]]


def test_a_block_without_a_held_token() -> None:
    """A prompt that is refused, or a policy that holds nothing back."""
    final = output("a", finish=FinishReason.STOP, stop_reason=BLOCKED)
    assert HoldBack().pass_through(final, hold=True) == [final]


def test_a_stop_string_that_spells_the_mark_is_no_block() -> None:
    box = HoldBack()
    box.pass_through(output("a", 1), hold=True)
    final = output("a", 2, finish=FinishReason.STOP, stop_reason="another")
    assert tokens_of(box.pass_through(final, hold=True)) == [[1], [2]]


def test_an_abort_drops_what_was_held() -> None:
    box = HoldBack()
    box.pass_through(output("a", 1), hold=True)
    box.pass_through(output("b", 1), hold=True)
    box.drop("a")
    box.drop("nobody")
    assert tokens_of(box.pass_through(output("a", 2, finish=FinishReason.ABORT), hold=True)) == [[2]]
    assert tokens_of(box.pass_through(output("b", 2, finish=FinishReason.STOP), hold=True)) == [[1], [2]]


def test_nothing_is_held_where_the_policy_does_not_ask() -> None:
    box = HoldBack()
    assert tokens_of(box.pass_through(output("a", 1), hold=False)) == [[1]]
    box.pass_through(output("b", 1), hold=True)
    assert tokens_of(box.pass_through(output("b", 2), hold=False)) == [[1], [2]]
