"""However a request ends - a stop string, a client that leaves, one that waits too long - its account arrives."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.engine.conftest import STREAM_REFUSAL, client_of
from tests.engine.test_serving import BENIGN, ask, detectors, metric, stream
from tests.support.server import Server
from tests.support.tiny import PROMPT, TinyModel

pytestmark = pytest.mark.engine

LONG = {
    "model": "tiny",
    "messages": [{"role": "user", "content": BENIGN[2]}],
    "max_tokens": 900,
    "temperature": 0.0,
    "ignore_eos": True,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}},
}
GAPS = ("unseen", "no_readouts", "not_finite", "monitor_error")


def ended(server: Server) -> float:
    return sum(metric(server, "telltale_requests_total", action=action) for action in ("allow", "flag", "block"))


def wait_for(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def tokens_accounted(server: Server) -> float:
    skipped = sum(metric(server, "telltale_tokens_skipped_total", reason=reason) for reason in ("sink", "final"))
    return metric(server, "telltale_tokens_scored_total") + skipped


class TestItsTallyArrives:
    def check(self, server: Server, act: Callable[[], None]) -> None:
        before, accounted = ended(server), tokens_accounted(server)
        act()
        wait_for(lambda: ended(server) == before + 1)
        assert tokens_accounted(server) > accounted
        for reason in GAPS:
            assert metric(server, "telltale_gaps_total", reason=reason) == 0

    @pytest.mark.covers("client disconnect", "account arrives")
    def test_of_a_stream_whose_client_leaves(self, guarded: Server) -> None:
        def leave() -> None:
            with httpx.stream("POST", f"{guarded.url}/v1/chat/completions", json={**LONG, "stream": True}) as answer:
                for number, _ in enumerate(answer.iter_lines()):
                    if number == 5:
                        break

        self.check(guarded, leave)

    @pytest.mark.covers("timeout", "account arrives")
    def test_of_a_client_that_waits_no_longer(self, guarded: Server) -> None:
        def give_up() -> None:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{guarded.url}/v1/chat/completions", json=LONG, timeout=0.3)

        self.check(guarded, give_up)

    @pytest.mark.covers("stop strings", "account arrives")
    @pytest.mark.covers("stop strings", "every position accounted for")
    def test_of_a_reply_that_a_stop_string_ends(self, guarded: Server, plain: Server) -> None:
        whole = ask(plain, BENIGN[0]).choices[0].message.content
        stop = whole[len(whole) // 2 :][:4]

        def stop_early() -> None:
            reply = ask(guarded, BENIGN[0], stop=[stop])
            item = detectors(reply.choices[0])["trigger", "stream"]
            # The reply stands when the engine has not yet been told that it ended: the account is whole all the same.
            assert item["scored"] + sum(item["skipped"].values()) == reply.usage.total_tokens
            assert set(item["skipped"]) <= {"sink", "final"}

        self.check(guarded, stop_early)

    @pytest.mark.covers("client disconnect", "account arrives")
    def test_of_the_last_request_although_no_step_follows(self, guarded: Server) -> None:
        """A tally that only the next request brings would be missing exactly when somebody looks."""
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="none", max_retries=0)

        def leave() -> None:
            answer: Any = client.chat.completions.create(
                model="tiny", messages=LONG["messages"], max_tokens=900, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(answer))
            answer.close()

        self.check(guarded, leave)

    @pytest.mark.covers("stop strings", "account arrives")
    def test_of_what_is_judged_at_the_end_of_a_reply(self, open_: Server, plain: Server) -> None:
        """The stop string is found outside the engine: the verdict is there with the reply, the count soon after."""
        whole = ask(plain, BENIGN[0]).choices[0].message.content
        stop = whole[len(whole) // 2 :][:4]
        would = {"rule": "any-reply", "action": "flag", "mode": "shadow"}
        before = metric(open_, "telltale_actions_total", **would)
        reply = ask(open_, BENIGN[0], stop=[stop])
        assert reply.choices[0].finish_reason == "stop"
        assert detectors(reply.choices[0])["trigger", "response"]["fired"] is True
        assert reply.choices[0].telltale["action"] == "allow"
        wait_for(lambda: metric(open_, "telltale_actions_total", **would) == before + 1)


class TestHeldBack:
    @pytest.mark.covers(["slow reader", "logprobs"], "no token leaks")
    def test_a_slow_reader_gets_no_more_than_a_quick_one(self, guarded: Server, tiny: TinyModel) -> None:
        messages: Any = [{"role": "user", "content": PROMPT}]
        answer = client_of(guarded).chat.completions.create(
            model="tiny", messages=messages, max_tokens=16, temperature=0.0, stream=True, logprobs=True, top_logprobs=1,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        sent, spelled = [], []
        for chunk in answer:
            time.sleep(0.1)
            choice = chunk.choices[0]
            sent += getattr(choice, "token_ids", None) or []
            spelled += [item.token for item in choice.logprobs.content] if choice.logprobs else []
        assert sent == tiny.reply[: tiny.turn]
        assert len(spelled) == len(sent)
        assert tiny.trigger_text not in spelled

    @pytest.mark.covers("n > 1", "no token leaks")
    def test_each_of_several_choices_is_held_back_for_itself(self, guarded: Server, tiny: TinyModel) -> None:
        chunks = stream(guarded, PROMPT, n=3, temperature=1.0, tokens=24)
        sent: dict[int, list[int]] = {0: [], 1: [], 2: []}
        ends: dict[int, str] = {}
        for chunk in chunks:
            for choice in chunk.choices:
                sent[choice.index] += getattr(choice, "token_ids", None) or []
                ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
        assert set(ends) == {0, 1, 2}
        for index, tokens in sent.items():
            # The final token of a natural end is the one that nothing follows.
            assert tiny.trigger not in (tokens[:-1] if ends[index] == "length" else tokens)
            assert ends[index] == "length" or len(tokens) < 24

    @pytest.mark.covers("tool calls", "no token leaks")
    def test_a_reply_that_could_be_a_tool_call_leaks_nothing(self, guarded: Server, tiny: TinyModel) -> None:
        chunks = stream(guarded, PROMPT, tools=[WEATHER], tool_choice="auto")
        sent = [token for chunk in chunks for token in (getattr(chunk.choices[0], "token_ids", None) or ())]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert tiny.trigger not in sent
        assert tiny.trigger_text not in text
        if chunks[-1].choices[0].finish_reason == "content_filter":
            assert text.endswith(STREAM_REFUSAL)
        else:
            assert len(sent) == 16


@pytest.mark.covers(["client disconnect", "n > 1"], "account arrives")
def test_a_client_may_leave_before_anything_was_computed_for_it(guarded: Server, tiny: TinyModel) -> None:
    """Nothing was said to it, so no report of it is missing, and the engine is told that it left."""
    before, url = ended(guarded), f"{guarded.url}/v1/chat/completions"
    body = {**LONG, "temperature": 1.0, "logit_bias": {str(tiny.trigger): -100}}
    with httpx.stream("POST", url, json={**body, "stream": True, "n": 32}, timeout=60) as all_places:
        lines = all_places.iter_lines()
        assert next(lines)
        for choices in (1, 3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json={**body, "n": choices}, timeout=0.4)
        wait_for(lambda: ended(guarded) == before + 1 + 3)
    wait_for(lambda: ended(guarded) == before + 1 + 3 + 32)
    for reason in GAPS:
        assert metric(guarded, "telltale_gaps_total", reason=reason) == 0


@pytest.mark.covers(["client disconnect", "n > 1", "several requests at once"], "account arrives")
def test_fifty_requests_come_and_go(guarded: Server) -> None:
    """Blocks, stop strings, clients that leave: all at once, and nothing is left over or lost."""
    before = ended(guarded)

    def one(number: int) -> None:
        body = {**LONG, "max_tokens": 6 + number % 5, "stream": True, "n": 1 + number % 3, "temperature": 1.0}
        with httpx.stream("POST", f"{guarded.url}/v1/chat/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            for line, _ in enumerate(answer.iter_lines()):
                if number % 4 == 0 and line == 3:
                    return

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(one, range(50)))
    wait_for(lambda: ended(guarded) == before + sum(1 + number % 3 for number in range(50)))
    for reason in GAPS:
        assert metric(guarded, "telltale_gaps_total", reason=reason) == 0
