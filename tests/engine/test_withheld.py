"""Replies that are withheld until something is done about them, in a real engine: chats, completions, streams."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.engine.test_serving import metric
from tests.engine.withheld import (
    CHAT,
    KEY,
    RAW,
    REFUSED,
    SYSTEM,
    ask,
    policy_of,
    trigger_of,
)
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import PROMPT, TinyModel
from tests.support.withheld_servers import UPSTREAM_TEXT, Outside

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tiny: TinyModel, far: Outside) -> Iterator[Server]:
    from probes.aggregate.m_of_n import MOfN
    from probes.card import Stage
    from tests.support.tiny import save_trigger

    folder = tiny.path.parent
    save_trigger(
        folder / "thrice_streamed.safetensors",
        tiny.path,
        name="thrice",
        stages=(Stage.STREAM,),
        aggregate=MOfN(count=3, window=256),
    )
    policy = folder / "withheld.yaml"
    policy.write_text(policy_of(far))
    command = telltale_command(
        tiny.path, policy, "--served-model-name", "tiny", "tiny-other", "--max-num-batched-tokens", "32"
    )
    with serving(command, folder / "withheld.log", environment={"FAR_KEY": "sk-far"}) as found:
        yield found


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def streamed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class TestBlockAtTheEnd:
    def test_nothing_of_the_reply_is_sent(self, server: Server, streamed: bool) -> None:
        said = ask(server, "end", streamed=streamed)
        assert (said.status, said.text, said.reasons, said.outcome) == (200, REFUSED, ["content_filter"], "refused")
        assert [item["action"] for item in said.described] == ["block"]

    @pytest.mark.parametrize("path", [CHAT, RAW])
    def test_a_good_reply_is_the_one_that_it_would_have_been(self, server: Server, path: str, streamed: bool) -> None:
        content = "What is a river?"
        expected = ask(server, "watch", content, path=path, streamed=streamed)
        found = ask(server, "end", content, path=path, streamed=streamed)
        assert expected.described[0]["action"] == "allow"
        assert (found.text, found.reasons, found.outcome) == (expected.text, expected.reasons, None)

    def test_a_stop_string_is_an_end(self, server: Server, tiny: TinyModel, streamed: bool) -> None:
        whole = ask(server, "watch").text
        after = whole[whole.index(tiny.trigger_text) + len(tiny.trigger_text) :]
        said = ask(server, "end", streamed=streamed, stop=[after[4:10]])
        assert (said.text, said.reasons) == (REFUSED, ["content_filter"])


class TestRegenerate:
    def test_the_second_reply_is_the_one_under_the_system_prompt(self, server: Server, streamed: bool) -> None:
        first, other = ask(server, "watch"), ask(server, "watch", system=SYSTEM)
        assert [said.described[0]["action"] for said in (first, other)] == ["flag", "allow"]
        said = ask(server, "again", streamed=streamed)
        assert (said.text, said.reasons, said.outcome) == (other.text, other.reasons, "second")
        assert other.text != first.text

    def test_raw_text_gets_the_system_prompt_in_front(self, server: Server, tiny: TinyModel) -> None:
        content = f"Tell me{tiny.trigger_text} please"
        other = ask(server, "watch", f"{SYSTEM}\n\n{content}", path=RAW)
        said = ask(server, "again-if-asked", content, path=RAW)
        assert (said.text, said.outcome) == (other.text, "second")

    def test_a_second_bad_reply_is_refused(self, server: Server, tiny: TinyModel, streamed: bool) -> None:
        said = ask(server, "again", streamed=streamed, **trigger_of(tiny))
        assert (said.text, said.reasons, said.outcome) == (REFUSED, ["content_filter"], "refused")

    def test_what_was_asked_is_answered_once_more_and_not_again(self, server: Server, tiny: TinyModel) -> None:
        content = f"Tell me{tiny.trigger_text} please"
        before = metric(server, "vllm:request_success_total", finished_reason="length")
        said = ask(server, "again-if-asked", content)
        assert said.text == ask(server, "watch", content, system=SYSTEM).text
        assert (said.outcome, said.described[0]["action"]) == ("second", "flag")
        # The first attempt ends before its first token; the plain one has run beside.
        assert metric(server, "vllm:request_success_total", finished_reason="length") == before + 2

    def test_the_second_reply_may_be_steered(self, server: Server, streamed: bool) -> None:
        plain = ask(server, "watch")
        said = ask(server, "again-steered", streamed=streamed)
        assert said.outcome in {"second", "refused"}
        assert said.text != plain.text
        (described,) = said.described
        if said.outcome == "second":
            assert [steered["name"] for steered in described["steered"]] == ["push"]

    def test_of_two_bad_ones_the_better_is_released(self, server: Server, streamed: bool) -> None:
        other = ask(server, "watch", system=SYSTEM)
        said = ask(server, "better", streamed=streamed)
        assert (said.text, said.outcome) == (other.text, "second")

    def test_token_ids_have_no_place_for_a_system_prompt(self, server: Server, tiny: TinyModel) -> None:
        said = ask(server, "again-if-asked", [5, tiny.trigger, 6], path=RAW)  # type: ignore[arg-type]
        assert (said.text, said.outcome) == (REFUSED, "failed_refused")

    def test_a_context_that_is_too_long_for_it_is_refused(self, server: Server, tiny: TinyModel) -> None:
        said = ask(server, "again-if-asked", tiny.trigger_text * 1021, path=RAW, tokens=2)
        assert (said.status, said.text, said.outcome) == (200, REFUSED, "failed_refused")

    def test_no_client_waits_for_it(self, server: Server) -> None:
        before = metric(server, "telltale_outcomes_total", action="regenerate", outcome="second")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}{CHAT}",
                json={"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 900,
                      "temperature": 0.0, "ignore_eos": True, "stream": True},
                headers={"authorization": f"Bearer {KEY}", "x-telltale-policy": "better"},
                timeout=1.0,
            )  # fmt: skip
        time.sleep(2)
        assert metric(server, "vllm:num_requests_running") == 0
        assert metric(server, "telltale_outcomes_total", action="regenerate", outcome="second") == before


OTHER_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 24},
    "/v1/messages": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 24},
    "/invocations": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 24},
}


class TestOtherRoutes:
    @staticmethod
    def post(server: Server, policy: str, path: str, **settings: Any) -> httpx.Response:
        body = {"model": "tiny", "temperature": 0.0, **OTHER_ROUTES[path], **settings}
        headers = {"authorization": f"Bearer {KEY}", "x-telltale-policy": policy}
        return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)

    @pytest.mark.parametrize("path", OTHER_ROUTES)
    def test_every_route_says_the_refusal_in_its_own_words(
        self, server: Server, tiny: TinyModel, path: str, streamed: bool
    ) -> None:
        answer = self.post(server, "end", path, stream=streamed)
        assert (answer.status_code, answer.headers["x-telltale-outcome"].rpartition("=")[2]) == (200, "refused")
        assert REFUSED in answer.text
        assert tiny.trigger_text not in answer.text

    @pytest.mark.parametrize("path", OTHER_ROUTES)
    def test_every_route_has_a_place_for_a_system_prompt(
        self, server: Server, tiny: TinyModel, path: str, streamed: bool
    ) -> None:
        answer = self.post(server, "again", path, stream=streamed)
        assert (answer.status_code, answer.headers["x-telltale-outcome"].rpartition("=")[2]) == (200, "second")
        assert tiny.trigger_text not in answer.text

    def test_nothing_is_kept_to_be_fetched_later(self, server: Server) -> None:
        answer = self.post(server, "end", "/v1/responses", background=True, store=True)
        assert answer.status_code == 400
        assert "x-telltale-outcome" not in answer.headers

    @pytest.mark.parametrize("path", [CHAT, RAW])
    def test_several_choices_are_withheld_together(
        self, server: Server, tiny: TinyModel, path: str, streamed: bool
    ) -> None:
        settings: dict[str, Any] = {"n": 3, "temperature": 1.0}
        bias = {"logit_bias": {str(tiny.trigger): 50}}
        said = ask(server, "flagged", path=path, streamed=streamed, **settings, **bias)
        assert (said.outcome, said.text, said.reasons) == ("flagged", REFUSED * 3, ["content_filter"] * 3)
        said = ask(server, "clean", path=path, streamed=streamed, **settings, **bias)
        assert (said.outcome, len(said.reasons)) == ("clean", 3)
        assert REFUSED not in said.text


class TestEscalate:
    @pytest.mark.parametrize(
        ("policy", "outcome", "released"),
        [
            ("flagged", "flagged", False),
            ("clean", "clean", True),
            ("error-blocks", "failed_refused", False),
            ("garbage-blocks", "failed_refused", False),
            ("truthy-blocks", "failed_refused", False),
            ("redirect-blocks", "failed_refused", False),
            ("huge-blocks", "failed_refused", False),
            ("slow-blocks", "failed_refused", False),
            ("slow-flags", "failed_flagged", True),
            ("dead-allows", "failed_released", True),
        ],
    )
    def test_the_classifier_decides_or_the_policy(
        self, server: Server, streamed: bool, policy: str, outcome: str, released: bool
    ) -> None:
        expected = ask(server, "watch")
        began = time.monotonic()
        said = ask(server, policy, streamed=streamed)
        assert time.monotonic() - began < 5
        assert said.outcome == outcome
        assert said.text == (expected.text if released else REFUSED)
        assert said.reasons == (expected.reasons if released else ["content_filter"])

    def test_the_classifier_gets_the_reply_and_its_score(self, server: Server, far: Outside) -> None:
        said = ask(server, "clean")
        path, _, asked = far.asked[-1]
        assert (path, asked["detector"], asked["score"]) == ("/clean", "trigger", 8.0)
        assert asked["text"].strip() == said.text.strip()

    def test_of_a_prompt_the_classifier_gets_the_prompt(self, server: Server, far: Outside, tiny: TinyModel) -> None:
        content = f"Tell me{tiny.trigger_text} please"
        assert ask(server, "clean-if-asked", content).outcome == "clean"
        assert content in far.asked[-1][2]["text"]

    def test_a_budget_is_kept(self, server: Server) -> None:
        assert [ask(server, "rare").outcome for _ in range(3)] == ["clean", "failed_refused", "failed_refused"]

    def test_a_second_probe_decides(self, server: Server, tiny: TinyModel, streamed: bool) -> None:
        assert ask(server, "probe", streamed=streamed).outcome == "clean"
        said = ask(server, "probe", streamed=streamed, **trigger_of(tiny))
        assert (said.text, said.outcome) == (REFUSED, "flagged")

    def test_the_model_itself_judges_and_its_question_is_no_users(self, server: Server, streamed: bool) -> None:
        expected = ask(server, "watch")
        before = metric(server, "telltale_requests_total", action="escalate", policy="judge")
        scored = metric(server, "telltale_tokens_scored_total")
        said = ask(server, "judge", streamed=streamed)
        assert said.outcome in {"clean", "flagged"}
        assert said.text == (expected.text if said.outcome == "clean" else REFUSED)
        assert metric(server, "telltale_requests_total", action="escalate", policy="judge") == before + 1
        assert metric(server, "telltale_unsigned_requests_total") == 0
        # The question itself holds the reply and more: none of it was scored.
        assert metric(server, "telltale_tokens_scored_total") - scored < 2 * (24 + 40)


class TestRoute:
    def test_another_name_of_this_server_answers(self, server: Server, tiny: TinyModel, streamed: bool) -> None:
        content = f"Tell me{tiny.trigger_text} please"
        said = ask(server, "other", content, streamed=streamed)
        assert (said.text, said.outcome) == (ask(server, "watch", content).text, "second")

    def test_another_server_answers_with_its_own_key(
        self, server: Server, far: Outside, tiny: TinyModel, streamed: bool
    ) -> None:
        said = ask(server, "far", f"Tell me{tiny.trigger_text} please", streamed=streamed)
        assert (said.text.strip(), said.outcome) == (UPSTREAM_TEXT, "routed")
        path, headers, asked = far.asked[-1]
        assert (path, asked["model"]) == ("/up/v1/chat/completions", "far")
        assert headers["authorization"] == "Bearer sk-far"
        assert KEY not in str(far.asked[-1])

    @pytest.mark.parametrize("policy", ["far-dead", "far-500"])
    def test_an_upstream_that_fails_is_a_refusal(
        self, server: Server, tiny: TinyModel, policy: str, streamed: bool
    ) -> None:
        said = ask(server, policy, f"Tell me{tiny.trigger_text} please", streamed=streamed)
        assert (said.text, said.reasons, said.outcome) == (REFUSED, ["content_filter"], "failed_refused")

    def test_a_prompt_that_is_harmless_streams_as_ever(self, server: Server) -> None:
        """Only its first token waits for the prompt to be judged: when it comes, the reply has not ended."""
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "What is a river?"}],
            "max_tokens": 900,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"authorization": f"Bearer {KEY}", "x-telltale-policy": "far"}
        with httpx.stream("POST", f"{server.url}{CHAT}", json=body, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data:")
            # vLLM says a step later what runs; a reply that was sent when it had ended would not run any more.
            assert any(metric(server, "vllm:num_requests_running") == 1 for _ in range(20))
            assert "x-telltale-outcome" not in answer.headers


def test_what_came_of_it_stands_in_metrics_and_the_audit_trail(server: Server, tiny: TinyModel) -> None:
    import sqlite3

    labels = {"rule": "rule", "action": "regenerate", "outcome": "refused", "policy": "again"}
    ask(server, "again", **trigger_of(tiny))
    counted = metric(server, "telltale_outcomes_total", **labels)
    requests = metric(server, "telltale_requests_total", policy="again", action="block")
    ask(server, "again", **trigger_of(tiny))
    assert metric(server, "telltale_outcomes_total", **labels) == counted + 1
    # The second reply was blocked; what then says so is no request of anybody's.
    assert metric(server, "telltale_requests_total", policy="again", action="block") == requests + 1
    with sqlite3.connect(tiny.path.parent / "withheld.db") as store:
        events = [json.loads(text) for (text,) in store.execute("select event from telltale_audit")]
    handled = [event for event in events if event["kind"] == "handled" and event["policy"] == "again"]
    assert {event["outcome"] for event in handled} >= {"second", "refused"}
