"""A conditional steering policy as its users drive it: only the requests that a detector flags are steered."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.engine.conftest import client_of
from tests.engine.test_serving import BENIGN, GREEDY, ask, metric, stream
from tests.support.server import Server
from tests.support.tiny import TinyModel

pytestmark = pytest.mark.engine

TOKENS = 12


def hot(tiny: TinyModel, times: int = 3) -> str:
    return "Tell me" + f"{tiny.trigger_text} " * times


def steered_tokens(server: Server) -> float:
    return metric(server, "telltale_tokens_steered_total", steer="push")


@pytest.mark.covers("steered requests", "isolation")
def test_of_many_at_once_only_the_flagged_ones_are_steered(open_: Server, plain: Server, tiny: TinyModel) -> None:
    contents = [BENIGN[number % 3] if number % 2 else hot(tiny) for number in range(8)]
    before = steered_tokens(open_)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda content: ask(open_, content, tokens=TOKENS), contents))
    expected = {content: ask(plain, content, tokens=TOKENS).choices[0].token_ids for content in set(contents)}
    for content, reply in zip(contents, replies, strict=True):
        choice = reply.choices[0]
        if content in BENIGN:
            assert choice.telltale["action"] == "allow"
            assert "steered" not in choice.telltale
            assert choice.token_ids == expected[content]
        else:
            assert (choice.telltale["action"], choice.telltale["rule"]) == ("steer", "steer-thrice")
            (steered,) = choice.telltale["steered"]
            assert steered["name"] == "push"
            assert steered["tokens"] == len(choice.token_ids) - 1
            assert steered["dose"] == {"mean": 0.25, "max": 0.25}
            assert choice.token_ids[0] == expected[content][0]
            assert choice.token_ids != expected[content]
    told = sum(reply.choices[0].telltale.get("steered", [{"tokens": 0}])[0]["tokens"] for reply in replies)
    assert steered_tokens(open_) - before == told > 0


def test_a_stream_tells_it_too_and_a_block_outdoes_it(open_: Server, tiny: TinyModel) -> None:
    whole = ask(open_, hot(tiny), tokens=TOKENS).choices[0]
    chunks = stream(open_, hot(tiny), tokens=TOKENS)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].telltale["steered"] == whole.telltale["steered"]
    settings: dict[str, Any] = {"max_tokens": TOKENS, **GREEDY}
    done = client_of(open_).completions.create(model="tiny", prompt=hot(tiny), **settings).choices[0]
    # Of a raw prompt the stream rule reads everything.
    assert (done.telltale["action"], done.telltale["rule"]) == ("block", "no-trigger-stream")
    assert "steered" not in done.telltale


def test_a_request_that_misses_the_threshold_is_not_steered(open_: Server, tiny: TinyModel) -> None:
    choice = ask(open_, hot(tiny, times=2), tokens=TOKENS).choices[0]
    assert choice.telltale["action"] != "steer"
    assert "steered" not in choice.telltale


def test_a_request_gets_the_steer_that_it_asks_for_and_may_have(open_: Server, plain: Server) -> None:
    def asked(**xargs: Any) -> Any:
        extra = {**GREEDY["extra_body"], "vllm_xargs": xargs}
        return ask(open_, BENIGN[0], tokens=TOKENS, extra_body=extra).choices[0]

    expected = ask(plain, BENIGN[0], tokens=TOKENS).choices[0].token_ids
    full, half, again = asked(steer="nudge"), asked(steer="nudge", steer_strength=0.25), asked(steer="nudge")
    assert [choice.telltale["action"] for choice in (full, half)] == ["allow", "allow"]
    assert [choice.telltale["steered"][0]["dose"]["mean"] for choice in (full, half)] == [0.5, 0.25]
    assert full.token_ids != expected
    assert half.token_ids != full.token_ids
    assert again.token_ids == full.token_ids
    assert ask(open_, BENIGN[0], tokens=TOKENS).choices[0].token_ids == expected
    for xargs in ({"steer": "push"}, {"steer": "nudge", "steer_strength": 0.75}):
        for streaming in (False, True):
            with pytest.raises(openai.BadRequestError, match=r"steer is 'push'. Known: nudge|takes above 0 to 0.5"):
                ask(open_, BENIGN[0], stream=streaming, extra_body={"vllm_xargs": xargs})
