"""The prompts of the benchmark: what a burst shares and what it does not, and that the seed alone decides."""

from __future__ import annotations

import dataclasses

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.bench import BenchError
from serving.bench.client import Client, Prompt
from serving.bench.load import Burst, Steady, Workload, burst_prompts, steady_prompts

VOCABULARY = 49152
LOWEST = 100


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens two prompts have in common, from the first on."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_the_default_burst_is_the_one_that_is_promised() -> None:
    burst = Burst()
    assert (burst.requests, burst.prefix_tokens, burst.ending_tokens, burst.output_tokens) == (16, 500, 20, 16)
    assert burst.prompt_tokens == 16 * 520
    # 500 tokens hold three blocks of 128, and 31 of 16.
    assert burst.shared_tokens(128) == 15 * 384
    assert burst.shared_tokens(16) == 15 * 496


@given(
    seed=st.integers(0, 2**31),
    number=st.integers(0, 100),
    requests=st.integers(2, 20),
    prefix=st.integers(1, 300),
    ending=st.integers(1, 30),
)
def test_a_burst_shares_its_prefix_and_not_one_token_more(
    seed: int, number: int, requests: int, prefix: int, ending: int
) -> None:
    burst = Burst(requests=requests, prefix_tokens=prefix, ending_tokens=ending)
    prompts = burst_prompts(Workload(burst=burst, seed=seed), number, vocabulary=VOCABULARY)
    assert len({prompt.name for prompt in prompts}) == requests
    assert sum(len(prompt.tokens) for prompt in prompts) == burst.prompt_tokens
    assert all(LOWEST <= token < VOCABULARY for prompt in prompts for token in prompt.tokens)
    for i, one in enumerate(prompts):
        assert all(common(one.tokens, other.tokens) == prefix for other in prompts[i + 1 :])


@pytest.mark.parametrize("block", [16, 128])
def test_bursts_share_no_block_with_each_other_or_with_the_steady_load(block: int) -> None:
    workload = Workload()
    groups = [
        [prompt.tokens for part in steady_prompts(workload, vocabulary=VOCABULARY) for prompt in part],
        *([p.tokens for p in burst_prompts(workload, number, vocabulary=VOCABULARY)] for number in range(20)),
    ]
    # A block is found by its tokens and all before them: no first block in common is no block in common.
    firsts = [{tokens[:block] for tokens in group} for group in groups]
    assert all(len(first) == 1 for first in firsts[1:])
    assert len(set.union(*firsts)) == sum(len(first) for first in firsts)


def test_both_servers_are_sent_the_same() -> None:
    workload = Workload()
    for number in (0, 7):
        assert burst_prompts(workload, number, vocabulary=VOCABULARY) == burst_prompts(
            dataclasses.replace(workload), number, vocabulary=VOCABULARY
        )
    assert steady_prompts(workload, vocabulary=VOCABULARY) == steady_prompts(Workload(), vocabulary=VOCABULARY)
    other = dataclasses.replace(workload, seed=1)
    assert burst_prompts(other, 0, vocabulary=VOCABULARY) != burst_prompts(workload, 0, vocabulary=VOCABULARY)


def test_the_steady_load_is_unrelated_prompts_of_one_length() -> None:
    steady = Steady(concurrent=3, prompt_tokens=40, output_tokens=5, single=2, single_prompt_tokens=30)
    together, single = steady_prompts(Workload(steady=steady), vocabulary=VOCABULARY)
    assert [len(prompt.tokens) for prompt in (*together, *single)] == [40, 40, 40, 30, 30]
    assert [prompt.output_tokens for prompt in together] == [5, 5, 5]
    assert len({prompt.name for prompt in (*together, *single)}) == len(together) + len(single)
    assert len({prompt.tokens[:4] for prompt in (*together, *single)}) == len(together) + len(single)


@pytest.mark.parametrize("tokens", [None, [], [1, 2]])
async def test_a_blocked_reply_ends_the_benchmark_with_a_word(tokens: list[int] | None) -> None:
    def blocked(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"choices": [{"token_ids": tokens, "finish_reason": "content_filter"}]})

    transport = httpx.MockTransport(blocked)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        with pytest.raises(BenchError, match="finish_reason 'content_filter'; 4 with 'length' were asked for"):
            await Client(http, "tiny", 0).complete(Prompt("one", (1, 2, 3), 4))
