"""The workloads of one turn: what is sent, when, and what is measured of it. Knows no server but its address."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from serving.bench.client import Client, Prompt, Reply, connect

_SETTLE_TOKENS = 4
_LOWEST_TOKEN = 100
"""Ids below it are markers in the embedded model's vocabulary."""


@dataclass(frozen=True, slots=True)
class Steady:
    """Unrelated requests; counts are requests or tokens.

    Attributes:
        concurrent: completions that run at once in the throughput phase.
        prompt_tokens, output_tokens: of each of them.
        single: streams, one after the other, in the phase for the time to first token.
        single_prompt_tokens, single_output_tokens: of each of them.
    """

    concurrent: int = 8
    prompt_tokens: int = 128
    output_tokens: int = 128
    single: int = 16
    single_prompt_tokens: int = 128
    single_output_tokens: int = 4


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests that share a prefix nobody has sent before, at once; counts are requests or tokens.

    Attributes:
        requests: streams, all sent together.
        prefix_tokens: that they share.
        ending_tokens: of each one's own.
        output_tokens: of each.
    """

    requests: int = 16
    prefix_tokens: int = 500
    ending_tokens: int = 20
    output_tokens: int = 16

    @property
    def prompt_tokens(self) -> int:
        """Of all requests together."""
        return self.requests * (self.prefix_tokens + self.ending_tokens)

    def shared_tokens(self, block_size: int) -> int:
        """How many prompt tokens come out of the cache if the prefix's full blocks are computed exactly once.

        Args:
            block_size: tokens in a KV block; what fills no block is not cached.
        """
        return (self.requests - 1) * (self.prefix_tokens // block_size * block_size)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a server in one turn: the steady load, then the burst.

    Attributes:
        steady, burst: each with figures of its own.
        seed: of the prompts (random tokens) and of the requests.
    """

    steady: Steady = field(default_factory=Steady)
    burst: Burst = field(default_factory=Burst)
    seed: int = 20260902


@dataclass(frozen=True, slots=True)
class Sample:
    """One workload in one turn.

    Attributes:
        seconds: the throughput phase, from the first request to the last reply.
        tokens: generated in it.
        first_seconds: time to first token of each stream.
        replies: those that are compared.
        requests: all that were sent, with those that only let the server settle.
        positions: prompt and generated tokens of all of them.
    """

    seconds: float
    tokens: int
    first_seconds: tuple[float, ...]
    replies: tuple[Reply, ...]
    requests: int
    positions: int

    @property
    def throughput(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds

    @property
    def ttft_seconds(self) -> float:
        """Median time to first token."""
        return float(np.median(self.first_seconds))


def steady_prompts(workload: Workload, *, vocabulary: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """The prompts of the throughput phase and of the single streams: random tokens, the same for the same seed."""
    rng, steady = np.random.default_rng(workload.seed), workload.steady

    def draw(number: int, length: int, output_tokens: int) -> Prompt:
        return Prompt(f"steady-{number}", _random(rng, length, vocabulary), output_tokens)

    concurrent = tuple(draw(number, steady.prompt_tokens, steady.output_tokens) for number in range(steady.concurrent))
    single = tuple(
        draw(steady.concurrent + number, steady.single_prompt_tokens, steady.single_output_tokens)
        for number in range(steady.single)
    )
    return concurrent, single


def burst_prompts(workload: Workload, number: int, *, vocabulary: int) -> tuple[Prompt, ...]:
    """The prompts of one burst: one prefix, and endings that differ from their first token on.

    Args:
        workload: the seed, and the burst.
        number: of the burst, from 0; each has a prefix of its own. Both servers are sent the same.
        vocabulary: size of the model's.
    """
    # From 1 on: numpy takes (seed, 0) for the seed alone, with which the steady prompts are drawn.
    rng, burst = np.random.default_rng((workload.seed, 1 + number)), workload.burst
    prefix = _random(rng, burst.prefix_tokens, vocabulary)
    # Distinct: no two requests may share a block beyond those of the prefix.
    firsts = _LOWEST_TOKEN + rng.choice(vocabulary - _LOWEST_TOKEN, size=burst.requests, replace=False)
    return tuple(
        Prompt(
            f"burst-{number}-{request}",
            (*prefix, int(first), *_random(rng, burst.ending_tokens - 1, vocabulary)),
            burst.output_tokens,
        )
        for request, first in enumerate(firsts)
    )


def measure_steady(url: str, model: str, workload: Workload, *, salt: str, vocabulary: int) -> Sample:
    """The steady load on one server.

    Args:
        url: of the server.
        model: as it is served.
        workload: what to ask.
        salt: never used before on this server: the prompts are the same in every round and must be computed anew.
        vocabulary: size of the model's.
    Raises:
        BenchError: a reply is not what was asked for: refused, blocked, or shorter.
        httpx.HTTPError: the server does not answer.
    """
    concurrent, single = steady_prompts(workload, vocabulary=vocabulary)
    return asyncio.run(_measure_steady(url, model, concurrent, single, workload.seed, salt=salt))


def measure_burst(url: str, model: str, workload: Workload, number: int, *, vocabulary: int) -> Sample:
    """One burst on one server that has not seen its prefix; otherwise as ``measure_steady``."""
    prompts = burst_prompts(workload, number, vocabulary=vocabulary)
    return asyncio.run(_measure_burst(url, model, prompts, workload.seed))


async def _measure_steady(
    url: str, model: str, concurrent: Sequence[Prompt], single: Sequence[Prompt], seed: int, *, salt: str
) -> Sample:
    async with connect(url) as http:
        client = Client(http, model, seed)
        # Not measured: a server that was stopped has cold caches and due timers.
        settling = [Prompt(prompt.name, prompt.tokens, _SETTLE_TOKENS) for prompt in concurrent]
        await asyncio.gather(*(client.complete(prompt, salt=f"{salt}-settle") for prompt in settling))
        start = time.perf_counter()
        replies = await asyncio.gather(*(client.complete(prompt, salt=salt) for prompt in concurrent))
        seconds = time.perf_counter() - start
        await client.stream(single[0], salt=f"{salt}-settle")
        streamed = [await client.stream(prompt, salt=salt) for prompt in single]
    return _sample(seconds, replies, streamed, sent=[*settling, *concurrent, single[0], *single])


async def _measure_burst(url: str, model: str, prompts: Sequence[Prompt], seed: int) -> Sample:
    async with connect(url) as http:
        client = Client(http, model, seed)
        start = time.perf_counter()
        replies = await asyncio.gather(*(client.stream(prompt) for prompt in prompts))
        seconds = time.perf_counter() - start
    return _sample(seconds, replies, (), sent=prompts)


def _sample(seconds: float, timed: Sequence[Reply], after: Sequence[Reply], *, sent: Sequence[Prompt]) -> Sample:
    replies = (*timed, *after)
    return Sample(
        seconds=seconds,
        tokens=sum(len(reply.tokens) for reply in timed),
        first_seconds=tuple(reply.first_seconds for reply in replies if reply.first_seconds is not None),
        replies=replies,
        requests=len(sent),
        positions=sum(len(prompt.tokens) + prompt.output_tokens for prompt in sent),
    )


def _random(rng: np.random.Generator, length: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(int(token) for token in rng.integers(_LOWEST_TOKEN, vocabulary, size=length))
