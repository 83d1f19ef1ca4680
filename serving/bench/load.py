"""The load: concurrent completions for throughput, then single streams for the first token. Knows HTTP alone."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import numpy as np

from serving.bench import BenchError

_TIMEOUT_SECONDS = 180.0
_SETTLE_TOKENS = 4
_LOWEST_TOKEN = 100
"""Ids below it are markers in the embedded model's vocabulary."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a server in one round; counts are requests or tokens.

    Attributes:
        concurrent: completions that run at once in the throughput phase.
        prompt_tokens, output_tokens: of each of them.
        single: streams, one after the other, in the phase for the time to first token.
        single_prompt_tokens, single_output_tokens: of each of them.
        seed: of the prompts (random tokens) and of the requests.
    """

    concurrent: int = 8
    prompt_tokens: int = 128
    output_tokens: int = 192
    single: int = 16
    single_prompt_tokens: int = 128
    single_output_tokens: int = 8
    seed: int = 20260902


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request: which prompt, its tokens, and how many are to be generated."""

    number: int
    tokens: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What was generated.

    Attributes:
        prompt: the prompt's number.
        tokens: the ids.
        first_seconds: from sending to the first token; None where the reply was not streamed.
    """

    prompt: int
    tokens: tuple[int, ...]
    first_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One round on one server.

    Attributes:
        seconds: the throughput phase, from the first request to the last reply.
        tokens: generated in it.
        first_seconds: time to first token of each single stream.
        replies: of both phases.
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


def make_prompts(workload: Workload, *, vocabulary: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """The prompts of the throughput phase and of the single streams: random tokens, the same for the same seed."""
    rng = np.random.default_rng(workload.seed)

    def draw(number: int, length: int, output_tokens: int) -> Prompt:
        tokens = rng.integers(_LOWEST_TOKEN, vocabulary, size=length)
        return Prompt(number, tuple(int(token) for token in tokens), output_tokens)

    concurrent = tuple(
        draw(number, workload.prompt_tokens, workload.output_tokens) for number in range(workload.concurrent)
    )
    single = tuple(
        draw(workload.concurrent + number, workload.single_prompt_tokens, workload.single_output_tokens)
        for number in range(workload.single)
    )
    return concurrent, single


def measure(url: str, model: str, workload: Workload, *, vocabulary: int) -> Sample:
    """One round on one server.

    Args:
        url: of the server.
        model: as it is served.
        workload: what to ask.
        vocabulary: size of the model's.
    Raises:
        BenchError: a reply is not what was asked for: refused, blocked, or shorter.
        httpx.HTTPError: the server does not answer.
    """
    concurrent, single = make_prompts(workload, vocabulary=vocabulary)
    return asyncio.run(_measure(url, model, concurrent, single, workload.seed))


async def _measure(url: str, model: str, concurrent: Sequence[Prompt], single: Sequence[Prompt], seed: int) -> Sample:
    # A client for each round: a connection does not outlast the stop of its server.
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_SECONDS, trust_env=False) as http:
        client = _Client(http, model, seed)
        # Not measured: a server that was stopped has cold caches and due timers.
        settling = [Prompt(prompt.number, prompt.tokens, _SETTLE_TOKENS) for prompt in concurrent]
        await asyncio.gather(*(client.complete(prompt) for prompt in settling))
        start = time.perf_counter()
        replies = await asyncio.gather(*(client.complete(prompt) for prompt in concurrent))
        seconds = time.perf_counter() - start
        await client.stream(single[0])
        streamed = [await client.stream(prompt) for prompt in single]
    sent = [*settling, *concurrent, single[0], *single]
    return Sample(
        seconds=seconds,
        tokens=sum(len(reply.tokens) for reply in replies),
        first_seconds=tuple(reply.first_seconds for reply in streamed if reply.first_seconds is not None),
        replies=(*replies, *streamed),
        requests=len(sent),
        positions=sum(len(prompt.tokens) + prompt.output_tokens for prompt in sent),
    )


class _Client:
    """Sends greedy completions whose length is fixed."""

    def __init__(self, http: httpx.AsyncClient, model: str, seed: int) -> None:
        self._http = http
        self._model = model
        self._seed = seed

    async def complete(self, prompt: Prompt) -> Reply:
        """One completion, whole."""
        response = await self._http.post("/v1/completions", json=self._body(prompt, stream=False))
        _require_ok(response.status_code, response.text)
        choice = response.json()["choices"][0]
        return _reply(prompt, choice["token_ids"], choice["finish_reason"])

    async def stream(self, prompt: Prompt) -> Reply:
        """One completion, as a stream."""
        tokens: list[int] = []
        finish: str | None = None
        first: float | None = None
        start = time.perf_counter()
        async with self._http.stream("POST", "/v1/completions", json=self._body(prompt, stream=True)) as response:
            if response.status_code != httpx.codes.OK:
                _require_ok(response.status_code, (await response.aread()).decode(errors="replace"))
            async for line in response.aiter_lines():
                now = time.perf_counter()
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                for choice in chunk.get("choices", ()):
                    tokens += choice.get("token_ids") or []
                    finish = choice.get("finish_reason") or finish
                    if tokens and first is None:
                        first = now - start
        return _reply(prompt, tokens, finish, first)

    def _body(self, prompt: Prompt, *, stream: bool) -> dict[str, object]:
        return {
            "model": self._model,
            "prompt": list(prompt.tokens),
            "max_tokens": prompt.output_tokens,
            "temperature": 0.0,
            "seed": self._seed,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": stream,
        }


def _reply(prompt: Prompt, tokens: Sequence[int], finish: str | None, first: float | None = None) -> Reply:
    if finish != "length" or len(tokens) != prompt.output_tokens:
        raise BenchError(
            f"prompt {prompt.number}: {len(tokens)} tokens came back with finish_reason {finish!r}; "
            f"{prompt.output_tokens} with 'length' were asked for. A detector fired, or the server ended the request: "
            "there is nothing to compare."
        )
    return Reply(prompt.number, tuple(tokens), first)


def _require_ok(status: int, body: str) -> None:
    if status != httpx.codes.OK:
        raise BenchError(f"a completion was answered with status {status}: {body[:500]}")
