"""One policy with every action and every way to join verdicts, in a real engine, through the openai client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import client_of
from tests.engine.test_serving import metric
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import TinyModel
from tests.support.withheld_servers import Outside

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SYSTEM = "Answer shortly and kindly."
REFUSED = "Not now."


def at_least(count: int) -> str:
    """The trigger stands in the prompt so many times."""
    aggregate = f"{{kind: m_of_n, count: {count}, window: 256}}"
    return f"{{detector: trigger, stage: prompt, aggregate: {aggregate}, above: {{value: 4.0}}}}"


def policy_of(far: Outside) -> str:
    return f"""\
version: "1"
detectors:
  - artifact: trigger.safetensors
  - artifact: thrice.safetensors
steers:
  - {{name: push, artifact: served_push.safetensors, op: add, strength: 0.5, positions: generated}}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    hold_back: 1
    text: "{REFUSED}"
    rules:
      - name: flag-two
        when: {{all: [{at_least(2)}, {{not: {at_least(3)}}}]}}
        do: {{action: flag}}
        mode: enforce
      - name: steer-three
        when: {{all: [{at_least(3)}, {{not: {at_least(4)}}}]}}
        do: {{action: steer, steer: push, gate: latched}}
        mode: enforce
      - name: regenerate-four
        when: {{all: [{at_least(4)}, {{not: {at_least(5)}}}]}}
        do: {{action: regenerate, system: "{SYSTEM}"}}
        mode: enforce
      - name: escalate-five
        when: {{all: [{at_least(5)}, {{not: {{any: [{at_least(6)}, {at_least(7)}]}}}}]}}
        do: {{action: escalate, to: {{classifier: "{far.url}/clean"}}, on_failure: block}}
        mode: enforce
      - name: route-six
        when: {{all: [{at_least(6)}, {{not: {at_least(7)}}}]}}
        do: {{action: route, to: {{model: tiny-other}}}}
        mode: enforce
      - name: block-seven
        when:
          all:
            - any: [{at_least(7)}, {at_least(9)}]
            - weigh: [{{detector: trigger, weight: 0.5}}, {{detector: thrice, weight: 0.5}}]
              stage: prompt
              above: {{value: 7.5}}
        do: {{action: block}}
        mode: enforce
      - name: cut
        when: {{detector: trigger, stage: stream}}
        do: {{action: block}}
        mode: enforce
      - name: would-block
        when: {at_least(1)}
        do: {{action: block}}
        mode: shadow
      - name: not-yet
        when: {at_least(1)}
        do: {{action: block}}
        mode: enforce
        rollout: {{percent: 0, by: request}}
"""


@pytest.fixture(scope="module")
def server(tiny: TinyModel, far: Outside) -> Iterator[Server]:
    policy = tiny.path.parent / "every_action.yaml"
    policy.write_text(policy_of(far))
    command = telltale_command(tiny.path, policy, "--served-model-name", "tiny", "tiny-other")
    with serving(command, policy.with_suffix(".log")) as found:
        yield found


def ask(server: Server, tiny: TinyModel, times: int, *, bias: int = -100) -> tuple[Any, str | None]:
    """A reply to a prompt with so many triggers, and what came of withholding it; the reply has none unless biased."""
    answer = client_of(server).chat.completions.with_raw_response.create(
        model="tiny",
        messages=[{"role": "user", "content": f"Tell me{tiny.trigger_text * times} please"}],
        max_tokens=8,
        temperature=0,
        logit_bias={str(tiny.trigger): bias},
        extra_body={"ignore_eos": True},
    )
    return answer.parse().choices[0], answer.headers.get("x-telltale-outcome")


def described(choice: Any) -> tuple[str, str | None]:
    return choice.telltale["action"], choice.telltale["rule"]


def test_each_action_is_what_comes_of_its_condition(server: Server, tiny: TinyModel, far: Outside) -> None:
    nothing, _ = ask(server, tiny, 0)
    assert described(nothing) == ("allow", None)
    one, _ = ask(server, tiny, 1)
    assert described(one)[0] == "allow"
    flagged, _ = ask(server, tiny, 2)
    assert described(flagged) == ("flag", "flag-two")

    steered, _ = ask(server, tiny, 3)
    assert described(steered) == ("steer", "steer-three")
    assert [item["name"] for item in steered.telltale["steered"]] == ["push"]

    again, outcome = ask(server, tiny, 4)
    assert outcome is not None and "regenerate-four" in outcome and "outcome=second" in outcome
    assert (described(again), again.finish_reason) == (("flag", "regenerate-four"), "length")

    escalated, outcome = ask(server, tiny, 5)
    assert outcome is not None and "escalate-five" in outcome and "outcome=clean" in outcome
    assert escalated.finish_reason == "length"
    assert [path for path, _, _ in far.asked] == ["/clean"]

    routed, outcome = ask(server, tiny, 6)
    assert outcome is not None and "route-six" in outcome and "outcome=second" in outcome
    assert (described(routed), routed.finish_reason) == (("flag", "route-six"), "length")
    assert [path for path, _, _ in far.asked] == ["/clean"]

    for times in (7, 8, 12):
        blocked, outcome = ask(server, tiny, times)
        assert (described(blocked), outcome) == (("block", "block-seven"), None)
        assert (blocked.finish_reason, blocked.message.content) == ("content_filter", REFUSED)
    cut, _ = ask(server, tiny, 0, bias=100)
    assert (described(cut), cut.finish_reason) == (("block", "cut"), "content_filter")


def test_the_metrics_say_what_was_done_and_what_would_have_been(server: Server, tiny: TinyModel) -> None:
    rules = {
        ("flag-two", "flag", "enforce"): 2,
        ("steer-three", "steer", "enforce"): 3,
        ("block-seven", "block", "enforce"): 7,
        ("would-block", "block", "shadow"): 1,
    }
    for (rule, action, mode), times in rules.items():
        labels = {"rule": rule, "action": action, "mode": mode}
        before = metric(server, "telltale_actions_total", **labels)
        ask(server, tiny, times)
        assert metric(server, "telltale_actions_total", **labels) == before + 1, rule
