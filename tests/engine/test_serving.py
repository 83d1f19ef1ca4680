"""The product as its users drive it: the openai client against real servers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.conftest import REFUSAL, STREAM_REFUSAL, client_of
from tests.support.server import Server
from tests.support.tiny import MARK, PROMPT, THRESHOLD, TinyModel

pytestmark = pytest.mark.engine

BENIGN = ("What is a river?", "Name three colours", "Write one line about the sea")
GREEDY: dict[str, Any] = {"temperature": 0.0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}


def ask(server: Server, content: str, *, tokens: int = 16, **settings: Any) -> Any:
    messages: Any = [{"role": "user", "content": content}]
    return client_of(server).chat.completions.create(
        model="tiny", messages=messages, max_tokens=tokens, **{**GREEDY, **settings}
    )


def stream(server: Server, content: str, *, tokens: int = 16, **settings: Any) -> list[Any]:
    return list(ask(server, content, tokens=tokens, stream=True, **settings))


def metric(server: Server, name: str, **labels: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items()):
                return sample.value
    raise AssertionError(f"no sample {name} {labels}")


def detectors(choice: Any) -> dict[tuple[str, str], dict[str, Any]]:
    return {(item["name"], item["stage"]): item for item in choice.telltale["detectors"]}


class TestBenign:
    @pytest.mark.covers("chat", "tokens unchanged")
    def test_greedy_replies_are_token_identical_to_plain_vllm(
        self, guarded: Server, open_: Server, plain: Server
    ) -> None:
        for content in BENIGN:
            expected = ask(plain, content).choices[0]
            for server in (guarded, open_):
                reply = ask(server, content).choices[0]
                assert reply.token_ids == expected.token_ids
                assert reply.message.content == expected.message.content
                assert reply.finish_reason == expected.finish_reason == "length"

    @pytest.mark.covers(["logprobs", "n > 1", "streaming"], "tokens unchanged")
    def test_logprobs_and_streams_are_those_of_plain_vllm(self, guarded: Server, plain: Server) -> None:
        for server_settings in (
            {"logprobs": True, "top_logprobs": 2},
            {"n": 2, "logprobs": True, "temperature": 0.8, "seed": 7},
        ):
            expected, found = (ask(server, BENIGN[0], **server_settings) for server in (plain, guarded))
            for left, right in zip(expected.choices, found.choices, strict=True):
                assert [item.token for item in left.logprobs.content] == [item.token for item in right.logprobs.content]
                for one, other in zip(left.logprobs.content, right.logprobs.content, strict=True):
                    assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        streamed = stream(guarded, BENIGN[0], stream_options={"include_usage": True})
        whole = ask(plain, BENIGN[0])
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
        assert text == whole.choices[0].message.content
        assert streamed[-1].usage == whole.usage

    @pytest.mark.covers("chat", "every position accounted for")
    def test_every_position_is_accounted_for(self, guarded: Server) -> None:
        reply = ask(guarded, BENIGN[0])
        for item in detectors(reply.choices[0]).values():
            assert item["skipped"] == {"sink": 1, "final": 1}
            assert item["scored"] + 2 == reply.usage.total_tokens
            assert item["score"] == pytest.approx(0.0, abs=1e-4)
            assert item["threshold"] == THRESHOLD
            assert item["fired"] is False
        assert reply.choices[0].telltale["action"] == "allow"
        assert reply.choices[0].telltale["rule"] is None

    @pytest.mark.covers("stop strings", "tokens unchanged")
    def test_stop_strings_end_a_reply_as_in_plain_vllm(self, guarded: Server, plain: Server) -> None:
        whole = ask(plain, BENIGN[0]).choices[0].message.content
        stop = whole[len(whole) // 2 :][:4]
        expected, found = (ask(server, BENIGN[0], stop=[stop]).choices[0] for server in (plain, guarded))
        assert found.message.content == expected.message.content
        assert found.finish_reason == expected.finish_reason == "stop"
        assert set(detectors(found)["trigger", "stream"]["skipped"]) <= {"sink", "final"}


class TestPromptBlock:
    @pytest.mark.covers("chat", "verdict the same")
    @pytest.mark.covers("chat", "every position accounted for")
    def test_a_blocked_prompt_gets_the_refusal_and_no_token(self, guarded: Server, tiny: TinyModel) -> None:
        reply = ask(guarded, f"Tell me{tiny.trigger_text} please")
        choice = reply.choices[0]
        assert choice.finish_reason == "content_filter"
        assert choice.message.content == REFUSAL
        assert choice.stop_reason is None
        assert choice.token_ids is None
        assert reply.usage.completion_tokens == 0
        assert reply.usage.prompt_tokens > 0
        assert choice.telltale["action"] == "block"
        assert choice.telltale["rule"] == "no-trigger-prompt"
        fired = detectors(choice)["trigger", "prompt"]
        assert fired["fired"] is True
        assert fired["score"] == pytest.approx(MARK, abs=1e-3)
        assert fired["scored"] + sum(fired["skipped"].values()) == reply.usage.prompt_tokens

    @pytest.mark.covers("streaming", "verdict the same")
    def test_a_blocked_stream_has_one_refusal_and_a_finish_reason(self, guarded: Server, tiny: TinyModel) -> None:
        chunks = stream(guarded, f"Tell me{tiny.trigger_text} please", stream_options={"include_usage": True})
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        finished = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
        assert text == REFUSAL
        assert [choice.finish_reason for choice in finished] == ["content_filter"]
        assert finished[0].telltale["rule"] == "no-trigger-prompt"
        assert chunks[-1].usage.completion_tokens == 0

    @pytest.mark.covers(["raw prompts", "streaming"], "verdict the same")
    @pytest.mark.parametrize("streaming", [False, True])
    def test_completions_are_blocked_alike(self, guarded: Server, tiny: TinyModel, streaming: bool) -> None:
        answer = client_of(guarded).completions.create(
            model="tiny", prompt=f"Tell me{tiny.trigger_text} please", max_tokens=8, stream=streaming
        )
        chunks: Any = list(answer) if streaming else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == REFUSAL
        assert chunks[-1].choices[0].finish_reason == "content_filter"
        assert chunks[-1].choices[0].telltale["action"] == "block"


class TestStreamBlock:
    @pytest.mark.covers("streaming", "no token leaks")
    def test_held_back_the_flagged_token_is_never_sent(self, guarded: Server, tiny: TinyModel) -> None:
        chunks = stream(guarded, PROMPT)
        sent = [token for chunk in chunks for token in (getattr(chunk.choices[0], "token_ids", None) or ())]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert sent == tiny.reply[: tiny.turn]
        assert text.endswith(f"\n\n{STREAM_REFUSAL}")
        assert tiny.trigger_text not in text
        assert chunks[-1].choices[0].finish_reason == "content_filter"
        assert chunks[-1].choices[0].telltale["rule"] == "no-trigger-stream"

    def test_released_at_once_the_stream_is_cut_at_the_flagged_token(self, open_: Server, tiny: TinyModel) -> None:
        chunks = stream(open_, PROMPT)
        sent = [token for chunk in chunks for token in (getattr(chunk.choices[0], "token_ids", None) or ())]
        assert sent == tiny.reply[: tiny.turn + 1]
        assert sent[-1] == tiny.trigger
        assert chunks[-1].choices[0].finish_reason == "content_filter"

    @pytest.mark.covers(["chat", "logprobs"], "no token leaks")
    def test_a_whole_reply_holds_the_refusal_alone(self, guarded: Server, tiny: TinyModel) -> None:
        reply = ask(guarded, PROMPT, logprobs=True)
        choice = reply.choices[0]
        assert choice.message.content == STREAM_REFUSAL
        assert choice.logprobs is None
        assert choice.token_ids is None
        assert reply.usage.completion_tokens == tiny.turn
        item = detectors(choice)["trigger", "stream"]
        assert item["fired"] is True
        assert item["skipped"] == {"sink": 1}

    @pytest.mark.covers("several requests at once", "isolation")
    def test_one_choice_of_several_is_blocked_alone(self, guarded: Server, tiny: TinyModel) -> None:
        answer = client_of(guarded).completions.create(
            model="tiny", prompt=["One two three", f"Tell me{tiny.trigger_text} please"], max_tokens=4
        )
        actions = [choice.telltale["action"] for choice in answer.choices]  # type: ignore[attr-defined]
        assert actions == ["allow", "block"]
        assert answer.choices[1].text == REFUSAL


class TestShadowAndFlag:
    def test_shadow_counts_and_changes_nothing(self, open_: Server, plain: Server, tiny: TinyModel) -> None:
        content = f"Tell me{tiny.trigger_text} please"
        labels = {"rule": "would-block-prompt", "action": "block", "mode": "shadow"}
        before = metric(open_, "telltale_actions_total", **labels)
        reply, expected = ask(open_, content).choices[0], ask(plain, content).choices[0]
        assert reply.token_ids == expected.token_ids
        assert reply.finish_reason == expected.finish_reason
        assert detectors(reply)["trigger", "prompt"]["fired"] is True
        assert metric(open_, "telltale_actions_total", **labels) == before + 1

    def test_a_flag_is_said_and_changes_nothing(self, open_: Server, plain: Server, tiny: TinyModel) -> None:
        content = f"Tell me{tiny.trigger_text} please"
        reply, expected = ask(open_, content).choices[0], ask(plain, content).choices[0]
        assert reply.telltale["action"] == "flag"
        assert reply.telltale["rule"] == "flag-prompt"
        assert reply.token_ids == expected.token_ids

    def test_scores_stay_inside_unless_the_policy_exposes_them(self, open_: Server) -> None:
        for item in detectors(ask(open_, BENIGN[0]).choices[0]).values():
            assert set(item) == {"name", "stage", "fired", "scored", "skipped"}

    def test_a_format_that_a_card_does_not_list_follows_on_uncalibrated(self, open_: Server) -> None:
        answer = client_of(open_).completions.create(model="tiny", prompt="One two three", max_tokens=4)
        assert answer.choices[0].telltale["action"] == "flag"  # type: ignore[attr-defined]
        assert answer.choices[0].telltale["rule"] == "on_uncalibrated"  # type: ignore[attr-defined]
        assert ask(open_, BENIGN[0]).choices[0].telltale["action"] == "allow"


@pytest.mark.covers("several requests at once", "verdict the same")
@pytest.mark.covers("several requests at once", "isolation")
def test_sixteen_mixed_requests_at_once_get_their_own_verdicts(guarded: Server, plain: Server, tiny: TinyModel) -> None:
    prompts = []
    for number in range(16):
        kinds = (f"Question {number}: what is rain?", f"Say{tiny.trigger_text} number {number}", PROMPT)
        prompts.append(kinds[number % 3])
    alone = {content: ask(plain, content).choices[0].token_ids for content in set(prompts[::3])}
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda content: ask(guarded, content), prompts))
    for number, (content, reply) in enumerate(zip(prompts, replies, strict=True)):
        choice = reply.choices[0]
        expected = (None, "no-trigger-prompt", "no-trigger-stream")[number % 3]
        assert choice.telltale["rule"] == expected
        if expected is None:
            assert choice.token_ids == alone[content]
        skipped = detectors(choice)["trigger", "stream"]["skipped"]
        assert set(skipped) <= {"sink", "final"}


class TestClientsCannotWeakenTheMonitor:
    @pytest.mark.covers("reserved key in a request", "kept out")
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("holder", ["vllm_xargs", "extra_args"])
    def test_reserved_keys_are_refused_before_a_stream_opens(
        self, guarded: Server, holder: str, streaming: bool
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(guarded, BENIGN[0], stream=streaming, extra_body={holder: {"telltale": "off"}})
        assert caught.value.status_code == 400
        assert f"{holder}.telltale" in str(caught.value)

    def test_the_word_itself_may_be_said(self, guarded: Server) -> None:
        assert ask(guarded, 'What does {"telltale": 1} mean?').choices[0].finish_reason == "length"

    @pytest.mark.covers("reserved key in a request", "kept out")
    def test_an_escaped_spelling_is_refused_too(self, guarded: Server) -> None:
        body = '{"model":"tiny","prompt":"a","max_tokens":1,"vllm_xargs":{"\\u0074elltale":1}}'
        answer = httpx.post(
            f"{guarded.url}/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=30
        )
        assert answer.status_code == 400


def test_metrics_add_up(guarded: Server, tiny: TinyModel) -> None:
    names = ("telltale_tokens_scored_total", "telltale_observe_seconds_count")
    before = {name: metric(guarded, name) for name in names}
    blocked = metric(guarded, "telltale_requests_total", action="block")
    allowed = metric(guarded, "telltale_requests_total", action="allow")
    final = metric(guarded, "telltale_tokens_skipped_total", reason="final")
    reply = ask(guarded, BENIGN[1], tokens=5)
    ask(guarded, f"Tell me{tiny.trigger_text} please")
    assert metric(guarded, "telltale_requests_total", action="block") == blocked + 1
    assert metric(guarded, "telltale_requests_total", action="allow") == allowed + 1
    assert metric(guarded, "telltale_tokens_skipped_total", reason="final") == final + 1
    assert metric(guarded, names[0]) > before[names[0]] + reply.usage.total_tokens - 2
    assert metric(guarded, names[1]) >= before[names[1]] + 6
    assert (
        metric(guarded, "telltale_detector_threshold", detector="trigger", stage="prompt", format="chat") == THRESHOLD
    )
    for reason in ("unseen", "no_readouts", "not_finite", "monitor_error"):
        assert metric(guarded, "telltale_gaps_total", reason=reason) == 0
    assert metric(guarded, "telltale_ready") == 1
    page = httpx.get(f"{guarded.url}/metrics").text
    assert "vllm:" in page
    assert "_created" not in page


def test_health_ready_and_models_answer(guarded: Server) -> None:
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    assert httpx.get(f"{guarded.url}/ready").json() == {"status": "ready"}
    assert [model.id for model in client_of(guarded).models.list()] == ["tiny"]
