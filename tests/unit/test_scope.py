"""A block of one choice of several: of that choice alone, or of all that were asked for with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.outputs import CompletionOutput

from monitor.monitor import Monitor
from monitor.report import Decided
from monitor.request import is_blocked
from monitor.rollout import Subjects
from monitor.types import Action, ActionCode, Mode
from monitor.yaml_file import PolicyError
from probes.card import Format
from serving.engine.frontend import CONTENT_FILTER, RECORD, withhold
from serving.engine.records import Record
from tests.unit.artifacts import make_card, plan_of, policy_text, unit_artifact
from tests.unit.script import Script, chat


def stop(scope: str, *, name: str = "stop", mode: str = "enforce") -> str:
    when = "{detector: harm, stage: stream, aggregate: {kind: max}, above: {value: 0.5}}"
    return f"{{name: {name}, when: {when}, do: {{action: block{scope}}}, mode: {mode}}}"


class Several:
    """Choices of requests, each with one prompt token."""

    def __init__(self, folder: Path, *rules: str) -> None:
        plan = plan_of(folder, policy_text("\n".join(rules)), {"harm": unit_artifact(make_card())})
        self.monitor, self.script, self.at = Monitor(plan), Script(plan), dict[str, int]()

    def admit(self, *names: str) -> None:
        for name in names:
            parent = name.partition("_")[2]
            self.monitor.admit(
                name,
                num_prompt=1,
                policy=None,
                fmt=Format.CHAT,
                prompt=chat(1),
                subjects=Subjects("tenant", "session", parent),
            )
            self.at[name] = 0

    def step(self, **scores: float) -> set[str]:
        """One token each; who is blocked after it."""
        parts = []
        for key, score in scores.items():
            name = key.removeprefix("c")
            parts.append((name, range(self.at[name], self.at[name] + 1), self.script.rows([score])))
            self.at[name] += 1
        self.monitor.observe(self.script.step(parts))
        return {name for name in self.at if is_blocked(self.monitor.get(name))}

    def end(self, name: str) -> None:
        self.monitor.finish(name, num_positions=self.at.pop(name), sampled=0, aborted=False)


@pytest.mark.parametrize(
    ("scope", "blocked"),
    [("", {"1_a"}), (", scope: choice", {"1_a"}), (", scope: request", {"0_a", "1_a", "2_a"})],
)
def test_a_block_stops_the_choice_or_the_request(tmp_path: Path, scope: str, blocked: set[str]) -> None:
    several = Several(tmp_path, stop(scope))
    several.admit("0_a", "1_a", "2_a", "0_b")
    assert several.step(c0_a=0, c1_a=0, c2_a=0, c0_b=0) == set()
    # The third waits for its turn: it is blocked all the same, before it says anything.
    assert several.step(c0_a=0, c1_a=9, c0_b=0) == blocked
    acted = several.monitor.take_tally().acted
    assert acted == {("stop", Action.BLOCK, Mode.ENFORCE, "default"): 1}
    for name in blocked:
        request = several.monitor.get(name)
        assert request is not None
        assert (request.rule, request.text) == ("stop", "I can't help with that.")


def test_a_choice_that_comes_later_is_blocked_too(tmp_path: Path) -> None:
    several = Several(tmp_path, stop(", scope: request"))
    several.admit("0_a")
    several.step(c0_a=0)
    assert several.step(c0_a=9) == {"0_a"}
    several.admit("1_a", "1_b")
    assert several.step() == {"0_a", "1_a"}


def test_nothing_is_kept_of_requests_that_have_ended(tmp_path: Path) -> None:
    several = Several(tmp_path, stop(", scope: request"))
    for _ in range(3):
        several.admit("0_a", "1_a")
        assert several.step(c0_a=0, c1_a=0) == set()
        assert several.step(c0_a=9) == {"0_a", "1_a"}
        several.end("0_a")
        several.end("1_a")
    assert not several.monitor._choices


def test_a_shadow_rule_stops_nobody(tmp_path: Path) -> None:
    several = Several(tmp_path, stop(", scope: request", mode="shadow"))
    several.admit("0_a", "1_a")
    several.step(c0_a=0, c1_a=0)
    assert several.step(c0_a=9) == set()


@pytest.mark.parametrize("scope", ["choice", "request"])
def test_a_choice_that_has_ended_before_is_not_sent_either(tmp_path: Path, scope: str) -> None:
    """Where the reply is sent as a whole: choices that have ended wait for the others."""
    several = Several(tmp_path, stop(f", scope: {scope}"))

    def output(index: int, decided: Decided | None) -> CompletionOutput:
        record = Record(several.monitor.plan)
        record.decided = decided
        made = CompletionOutput(index, f"choice {index}", [1], None, None, finish_reason="stop")
        setattr(made, RECORD, record)
        return made

    blocked = output(2, Decided(int(ActionCode.BLOCK), "stop", "No."))
    assert getattr(blocked, RECORD).blocks_request == (scope == "request")
    if scope == "choice":
        return
    own = output(1, Decided(int(ActionCode.BLOCK), "stop", "My own."))
    outputs = [output(0, Decided(int(ActionCode.FLAG), "other", "")), own, None]
    withhold(outputs, getattr(blocked, RECORD))
    first = outputs[0]
    assert first is not None
    assert (first.text, first.finish_reason) == ("No.", CONTENT_FILTER)
    assert getattr(first, RECORD).describe()["action"] == "block"
    assert own.text == "choice 1"  # it has been made a refusal already, by what dressed it


def test_only_a_block_has_a_scope(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"rules\[0\]\.do: 'scope' says which choices a block stops"):
        Several(tmp_path, stop(", scope: request").replace("block", "flag"))
    with pytest.raises(PolicyError, match=r"do\.scope: is 'all'\. Known: choice, request\."):
        Several(tmp_path, stop(", scope: all"))
