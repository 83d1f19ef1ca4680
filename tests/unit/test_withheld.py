"""The layer that withholds: what is asked, what is released, and what a client sees when something fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from monitor.attempt import Attempt
from monitor.report import Decided
from monitor.types import Action, ActionCode
from probes.card import Format
from serving.engine.judge import JudgeError
from serving.engine.records import Record
from tests.support.withheld_servers import UPSTREAM_TEXT, Outside, outside
from tests.unit.script import chat
from tests.unit.withheld_script import REFUSAL, Turn, Withheld

PROMPT = "when: {detector: harm, stage: prompt, aggregate: {kind: max}, above: {value: 1}}"
STREAM = "when: {detector: harm, stage: stream, aggregate: {kind: max}, above: {value: 1}}"
END = "when: {detector: harm, stage: response, aggregate: {kind: mean}, above: {value: 1}}"
GOOD, BAD = Turn([0, 0]), Turn([0, 0], [0, 9, 0], "bad")
ASKED = Turn([0, 9], text="asked")


def rule(when: str, do: str, *, name: str = "rule", more: str = "mode: enforce") -> str:
    return f"{{name: {name}, {when}, do: {{{do}}}, {more}}}"


def text_of(turn: Turn) -> str:
    return "".join(f"{turn.text}{at} " for at in range(len(turn.prompt), len(turn.prompt) + len(turn.reply)))


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


AGAIN = "action: regenerate, system: Be good."
JUDGED = "action: escalate, to: {judge: 'Bad? {text}'}, on_failure: block"


async def test_a_block_at_the_end_shows_nothing_of_the_reply(tmp_path: Path, stream: bool) -> None:
    layer = Withheld(tmp_path, [rule(END, "action: block")])
    assert await layer.ask(GOOD, stream=stream) == (text_of(GOOD), None)
    assert layer.told == []
    text, outcome = await layer.ask(BAD, stream=stream)
    # A whole reply is the refusal already when it comes from the application, which the script does not do.
    assert (text if stream else text.removeprefix(text_of(BAD)), outcome) == (REFUSAL, "refused")
    assert layer.told == [("rule", "refused")]


async def test_policies_that_withhold_nothing_are_passed_by(tmp_path: Path) -> None:
    layer = Withheld(tmp_path, [rule(STREAM, "action: block"), rule(END, AGAIN, name="tried", more="mode: shadow")])
    await layer.ask(GOOD)
    assert layer.holds == [None]


class TestRegenerate:
    @pytest.mark.parametrize(
        ("turns", "expected"),
        [
            ([BAD, GOOD], (text_of(GOOD), "second")),
            ([BAD, BAD], (REFUSAL, "refused")),
            ([BAD, Turn([0], status=400)], (REFUSAL, "failed_refused")),
            ([GOOD], (text_of(GOOD), None)),
        ],
    )
    async def test_the_second_reply_is_released_or_none(
        self, tmp_path: Path, stream: bool, turns: list[Turn], expected: tuple[str, str | None]
    ) -> None:
        layer = Withheld(tmp_path, [rule(STREAM, AGAIN)])
        found = await layer.ask(*turns, stream=stream)
        assert (found[0][-len(expected[0]) :], found[1]) == expected
        assert stream is False or found == expected
        assert [hold.attempt for hold in layer.holds[: len(turns)] if hold] == [Attempt.FIRST, Attempt.SECOND][
            : len(turns)
        ]
        if len(turns) > 1:
            assert layer.bodies[1]["messages"][0] == {"role": "system", "content": "Be good."}

    async def test_it_is_done_once(self, tmp_path: Path, stream: bool) -> None:
        """However bad the second reply is: there is no third attempt, only what says the refusal."""
        layer = Withheld(tmp_path, [rule(STREAM, AGAIN), rule(END, AGAIN, name="late")])
        await layer.ask(BAD, BAD, GOOD, GOOD, stream=stream)
        assert layer.turns == [GOOD, GOOD]
        assert all(hold is not None and hold.refusal is not None for hold in layer.holds[2:])

    async def test_a_prompt_is_answered_again_and_flagged(self, tmp_path: Path, stream: bool) -> None:
        layer = Withheld(tmp_path, [rule(PROMPT, AGAIN)])
        assert await layer.ask(ASKED, ASKED, stream=stream) == (text_of(ASKED), "second")
        assert await layer.ask(GOOD, stream=stream) == (text_of(GOOD), None)

    @pytest.mark.parametrize(
        ("first", "second", "kept"), [(5, 3, "second"), (3, 5, "first"), (4, 4, "second"), (5, 0, "second")]
    )
    async def test_the_better_of_two_is_released(
        self, tmp_path: Path, stream: bool, first: float, second: float, kept: str
    ) -> None:
        layer = Withheld(tmp_path, [rule(END, f"{AGAIN}, otherwise: release")])
        turns = {name: Turn([0, 0], [score, score], name) for name, score in (("first", first), ("second", second))}
        assert await layer.ask(*turns.values(), stream=stream) == (text_of(turns[kept]), kept)

    async def test_a_block_of_the_second_reply_wins(self, tmp_path: Path, stream: bool) -> None:
        layer = Withheld(tmp_path, [rule(PROMPT, AGAIN), rule(STREAM, "action: block", name="cut")])
        text, outcome = await layer.ask(ASKED, Turn([0, 9], [9], "bad"), stream=stream)
        assert (text, outcome) == (REFUSAL, "refused")

    async def test_its_budget_is_kept(self, tmp_path: Path) -> None:
        now = [0.0]
        layer = Withheld(tmp_path, [rule(STREAM, f"{AGAIN}, budget: 2")], clock=lambda: now[0])
        found = []
        for moment in (0, 30, 59, 61, 62):
            now[0] = moment
            found.append((await layer.ask(BAD, GOOD))[1])
        assert found == ["second", "second", "failed_refused", "second", "failed_refused"]

    async def test_what_was_drawn_for_the_first_attempt_holds_for_the_second(self, tmp_path: Path) -> None:
        """Rollouts by request: else trying again, which the server does by itself, would be a way out."""
        rollout = "mode: enforce, rollout: {percent: 50, by: request}"
        layer = Withheld(tmp_path, [rule(PROMPT, AGAIN), rule(STREAM, "action: flag", name="noted", more=rollout)])
        for _ in range(8):
            await layer.ask(ASKED, ASKED)
        firsts, seconds = layer.drawn[::2], layer.drawn[1::2]
        assert firsts == seconds
        assert len(set(firsts)) == 8


class TestEscalate:
    @pytest.mark.parametrize(("answer", "expected"), [(False, "clean"), (True, "flagged")])
    async def test_a_judge_decides(self, tmp_path: Path, stream: bool, answer: bool, expected: str) -> None:
        layer = Withheld(tmp_path, [rule(STREAM, JUDGED)])
        layer.judge.answer = answer
        found = await layer.ask(BAD, stream=stream)
        assert found == (REFUSAL if answer else text_of(BAD), expected)
        assert layer.judge.asked == [("Bad? {text}", "<5>")]

    @pytest.mark.parametrize("answer", [None, JudgeError("too long")])
    @pytest.mark.parametrize(("on_failure", "outcome"), [("block", "failed_refused"), ("allow", "failed_released")])
    async def test_a_judge_that_does_not_answer_is_the_policys(
        self, tmp_path: Path, answer: Exception | None, on_failure: str, outcome: str
    ) -> None:
        do = f"action: escalate, to: {{judge: '{{text}}'}}, timeout: 100ms, on_failure: {on_failure}"
        layer = Withheld(tmp_path, [rule(STREAM, do)])
        layer.judge.answer = answer
        assert await layer.ask(BAD, stream=True) == (REFUSAL if on_failure == "block" else text_of(BAD), outcome)

    async def test_a_prompt_is_what_is_judged_where_the_rule_reads_it(self, tmp_path: Path) -> None:
        layer = Withheld(tmp_path, [rule(PROMPT, JUDGED)])
        assert (await layer.ask(ASKED))[1] == "clean"
        assert layer.judge.asked == [("Bad? {text}", "<2>")]

    @pytest.mark.parametrize(("above", "expected"), [(4, "flagged"), (5, "clean")])
    async def test_a_second_probe_decides(self, tmp_path: Path, stream: bool, above: float, expected: str) -> None:
        probe = f"{{detector: other, stage: stream, aggregate: {{kind: max}}, above: {{value: {above}}}}}"
        layer = Withheld(tmp_path, [rule(STREAM, f"action: escalate, to: {{probe: {probe}}}, on_failure: block")])
        assert (await layer.ask(BAD, stream=stream))[1] == expected

    @pytest.mark.parametrize("fault", ["error", "garbage", "truthy", "redirect", "huge", "slow", "dead"])
    @pytest.mark.parametrize("on_failure", ["block", "flag", "allow"])
    async def test_a_failure_is_the_policys(self, tmp_path: Path, far: Outside, fault: str, on_failure: str) -> None:
        url = "http://127.0.0.1:9/dead" if fault == "dead" else f"{far.url}/{fault}"
        do = f"action: escalate, to: {{classifier: '{url}'}}, timeout: 200ms, on_failure: {on_failure}"
        layer = Withheld(tmp_path, [rule(STREAM, do)])
        outcome = {"block": "refused", "flag": "flagged", "allow": "released"}[on_failure]
        text = REFUSAL if on_failure == "block" else text_of(BAD)
        assert await layer.ask(BAD, stream=True) == (text, f"failed_{outcome}")

    @pytest.mark.parametrize("answer", ["flagged", "clean"])
    async def test_a_classifier_decides(self, tmp_path: Path, far: Outside, answer: str) -> None:
        do = f"action: escalate, to: {{classifier: '{far.url}/{answer}'}}, on_failure: block"
        layer = Withheld(tmp_path, [rule(STREAM, do)])
        assert (await layer.ask(BAD, stream=True))[1] == answer
        assert far.asked[-1][2] == {"text": "<5>", "detector": "harm", "score": 9.0}

    async def test_an_answer_that_comes_again_is_judged_too(self, tmp_path: Path, stream: bool) -> None:
        """The second reply of a regeneration waits for its second opinion like any other."""
        judged = rule(END, JUDGED, name="judged")
        layer = Withheld(tmp_path, [rule(PROMPT, AGAIN), judged])
        layer.judge.answer = True
        assert await layer.ask(ASKED, Turn([0, 9], [9, 9], "bad"), stream=stream) == (REFUSAL, "refused")
        assert layer.told == [("judged", "flagged"), ("rule", "refused")]


class TestRoute:
    async def test_another_model_of_this_server_is_asked(self, tmp_path: Path, stream: bool) -> None:
        layer = Withheld(tmp_path, [rule(PROMPT, "action: route, to: {model: careful}")])
        assert await layer.ask(ASKED, ASKED, stream=stream, model="quick") == (text_of(ASKED), "second")
        assert [body["model"] for body in layer.bodies] == ["quick", "careful"]

    async def test_another_server_is_asked(self, tmp_path: Path, far: Outside) -> None:
        to = f"{{upstream: '{far.url}/up/v1', model: far, key_env: KEY}}"
        layer = Withheld(tmp_path, [rule(PROMPT, f"action: route, to: {to}")])
        layer.turns = [ASKED]
        answer = await raw(layer, model="quick", vllm_xargs={"steer": "x"})
        assert answer.json()["choices"][0]["message"]["content"] == UPSTREAM_TEXT
        path, headers, body = far.asked[-1]
        assert (path, body["model"], headers["authorization"]) == ("/up/v1/chat/completions", "far", "Bearer sk-far")
        assert "vllm_xargs" not in body
        assert layer.told == [("rule", "routed")]

    @pytest.mark.parametrize("where", ["down", "redirect", "dead"])
    async def test_a_dead_one_is_a_refusal(self, tmp_path: Path, far: Outside, stream: bool, where: str) -> None:
        url = "http://127.0.0.1:9/v1" if where == "dead" else f"{far.url}/{where}/v1"
        layer = Withheld(tmp_path, [rule(PROMPT, f"action: route, to: {{upstream: '{url}'}}, timeout: 500ms")])
        assert await layer.ask(ASKED, stream=stream) == (REFUSAL, "failed_refused")


@pytest.fixture(scope="module")
def far() -> Any:
    with outside() as found:
        yield found


async def raw(layer: Withheld, **body: Any) -> Any:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(layer.app), base_url="http://test") as client:
        return await client.post("/v1/chat/completions", json={"messages": [], **body})


async def test_a_client_that_leaves_ends_it(tmp_path: Path, far: Outside) -> None:
    do = f"action: escalate, to: {{classifier: '{far.url}/slow'}}, timeout: 30s, on_failure: allow"
    layer = Withheld(tmp_path, [rule(STREAM, do)])
    layer.turns = [BAD]
    left, sent = asyncio.Event(), []
    waiting = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Any:
        if waiting:
            return waiting.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
    request = asyncio.create_task(layer.app(scope, receive, send))
    await asyncio.sleep(0.3)
    assert not request.done()
    left.set()
    await asyncio.wait_for(request, 2)
    assert (sent, layer.told) == ([], [("rule", "left")])


@pytest.mark.parametrize(
    ("do", "withheld", "shown"),
    [
        (JUDGED, True, None),
        (JUDGED, False, REFUSAL),
        ("action: route, to: {model: m}", True, REFUSAL),
        (AGAIN, True, REFUSAL),
        (f"{AGAIN}, otherwise: release", True, None),
        (f"{AGAIN}, otherwise: release", False, REFUSAL),
    ],
)
def test_what_is_not_carried_out_is_shown_as_a_refusal(
    tmp_path: Path, do: str, withheld: bool, shown: str | None
) -> None:
    """Only a reply that somebody withholds, and that may be released, is shown as it is."""
    layer = Withheld(tmp_path, [rule(STREAM, do)])
    record = Record(layer.monitor.plan)
    record.decided = Decided(int(ActionCode(Action(do.split(",", maxsplit=1)[0].split()[1]).severity)), "rule", REFUSAL)
    record.withheld = withheld
    assert record.blocked_text == shown


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(["flag", "escalate", "route", "regenerate", "block"]), upto=st.integers(1, 5))
def test_the_most_severe_wins_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], upto: int
) -> None:
    do = {
        "flag": "action: flag",
        "escalate": JUDGED,
        "route": "action: route, to: {model: m}",
        "regenerate": AGAIN,
        "block": "action: block",
    }
    chosen = order[:upto]
    layer = Withheld(tmp_path_factory.mktemp("order"), [rule(PROMPT, do[action], name=action) for action in chosen])
    for attempt, expected in (
        (Attempt.FIRST, max(chosen, key=lambda action: Action(action).severity)),
        (Attempt.UNHELD, "flag" if chosen == ["flag"] else "block"),
        (Attempt.SECOND, "block" if "block" in chosen else "flag"),
    ):
        layer.monitor.admit(attempt.value, num_prompt=2, policy=None, fmt=Format.CHAT, prompt=chat(2), attempt=attempt)
        layer.monitor.observe(layer.script.step([(attempt.value, range(2), layer.script.rows([[0, 0], [9, 0]]))]))
        request = layer.monitor.get(attempt.value)
        assert request is not None
        assert request.action.action.value == expected
