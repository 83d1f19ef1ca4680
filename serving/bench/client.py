"""The client: greedy completions of token prompts, whole or as a stream, whose length is fixed. Knows HTTP alone."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from serving.bench import BenchError

_TIMEOUT_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request.

    Attributes:
        name: the same in every round that sends these tokens, and no other's.
        tokens: ids.
        output_tokens: to be generated.
    """

    name: str
    tokens: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What was generated.

    Attributes:
        prompt: the prompt's name.
        tokens: the ids.
        first_seconds: from sending to the first token; None where the reply was not streamed.
    """

    prompt: str
    tokens: tuple[int, ...]
    first_seconds: float | None = None


class Client:
    """Sends to one server.

    Args:
        http: with the server's address; see ``connect``.
        model: as it is served.
        seed: of the requests.
    """

    def __init__(self, http: httpx.AsyncClient, model: str, seed: int) -> None:
        self._http = http
        self._model = model
        self._seed = seed

    async def complete(self, prompt: Prompt, *, salt: str | None = None) -> Reply:
        """One completion, whole.

        Args:
            prompt: what to ask.
            salt: of the prefix cache: only requests with the same one share cached blocks; None is one too.
        Raises:
            BenchError: the reply is not what was asked for: refused, blocked, or shorter.
            httpx.HTTPError: the server does not answer.
        """
        response = await self._http.post("/v1/completions", json=self._body(prompt, salt, stream=False))
        _require_ok(response.status_code, response.text)
        choice = response.json()["choices"][0]
        # A blocked reply has none: nothing may spell what was withheld.
        return _reply(prompt, choice["token_ids"] or (), choice["finish_reason"])

    async def stream(self, prompt: Prompt, *, salt: str | None = None) -> Reply:
        """One completion, as a stream; see ``complete``."""
        tokens: list[int] = []
        finish: str | None = None
        first: float | None = None
        start = time.perf_counter()
        async with self._http.stream("POST", "/v1/completions", json=self._body(prompt, salt, stream=True)) as response:
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

    def _body(self, prompt: Prompt, salt: str | None, *, stream: bool) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self._model,
            "prompt": list(prompt.tokens),
            "max_tokens": prompt.output_tokens,
            "temperature": 0.0,
            "seed": self._seed,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": stream,
        }
        return body if salt is None else body | {"cache_salt": salt}


def connect(url: str) -> httpx.AsyncClient:
    """Connections for one turn: they do not outlast the stop of their server."""
    return httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_SECONDS, trust_env=False)


def _reply(prompt: Prompt, tokens: Sequence[int], finish: str | None, first: float | None = None) -> Reply:
    if finish != "length" or len(tokens) != prompt.output_tokens:
        raise BenchError(
            f"prompt {prompt.name}: {len(tokens)} tokens came back with finish_reason {finish!r}; "
            f"{prompt.output_tokens} with 'length' were asked for. A detector fired, or the server ended the request: "
            "there is nothing to compare."
        )
    return Reply(prompt.name, tuple(tokens), first)


def _require_ok(status: int, body: str) -> None:
    if status != httpx.codes.OK:
        raise BenchError(f"a completion was answered with status {status}: {body[:500]}")
