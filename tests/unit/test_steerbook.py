"""Who is steered from where on, and whose KV that is: settled once, told exactly, shared only with one's like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from monitor.policy import Plan
from monitor.rollout import Subjects
from monitor.types import ActionCode, Gap, Mode
from probes.card import Format
from probes.steering.steer import END
from serving.engine.steer_order import STEERS, GateOrder, SteerOrder
from serving.engine.steerbook import SteerBook
from tests.unit.script import Case
from tests.unit.test_steers import CALM, STEER, compiled, do

SIZE = 4
PROMPT = 10
ALL = CALM.replace("cap", "cap, strength: 0.5, positions: all")


class Engine:
    """A book, a monitor and the requests that both know."""

    def __init__(self, plan: Plan, *, ahead: bool = False) -> None:
        init_none_hash(sha256)
        self.plan = plan
        self.book = SteerBook(plan, block_size=SIZE, ahead=ahead)
        self.case = Case(plan)
        self.requests: dict[str, Request] = {}

    def admit(
        self,
        name: str = "a",
        *,
        salt: str | None = None,
        asked: Mapping[str, float] | None = None,
        first: int = 0,
        subjects: Subjects | None = None,
    ) -> Request:
        request = Request(
            name,
            list(range(first, first + PROMPT)),
            SamplingParams(max_tokens=50),
            None,
            cache_salt=salt,
            block_hasher=get_request_block_hasher(SIZE, sha256),
        )
        self.requests[name] = request
        self.case.admit(name, num_prompt=PROMPT, subjects=subjects)
        live = self.case.monitor.get(name)
        assert live is not None
        self.book.admit(request, live, self.plan.policies[0], asked or {})
        return request

    def schedule(self, count: int, *, computed: int, name: str = "a") -> tuple[SteerOrder | GateOrder, ...]:
        """vLLM has counted the step's tokens as computed by then."""
        self.requests[name].num_computed_tokens = computed + count
        step = SimpleNamespace(num_scheduled_tokens={name: count})
        self.book.scheduled(step, self.requests)
        return dict(getattr(step, STEERS, {})).get(name, ())

    def see(self, scores: list[float], start: int, name: str = "a") -> None:
        rows = self.case.script.rows(scores)
        self.book.seen(self.case.script.step([(name, range(start, start + len(scores)), rows)]))
        self.case.see(scores, start, name)
        self.book.judged([name], self.case.monitor)

    def tell(self, positions: range, doses: np.ndarray | None, name: str = "a") -> None:
        rows = self.case.script.rows([0.0] * len(positions))
        self.book.tell(self.case.script.step([(name, positions, rows)]), doses, self.case.monitor)


@pytest.mark.parametrize(("percent", "steered"), [(0, False), (100, True)])
@pytest.mark.parametrize("when", ["", "aggregate: {kind: last}, above: {value: 2}"], ids=["in the pass", "latched"])
def test_outside_of_a_rollout_nothing_is_written(tmp_path: Path, percent: int, steered: bool, when: str) -> None:
    rule = do("r", STEER, when=when).replace("mode: enforce", f"mode: enforce, rollout: {{percent: {percent}}}")
    engine = Engine(compiled(tmp_path, CALM, rule))
    engine.admit("a", subjects=Subjects("tenant"))
    assert engine.book.is_empty != steered
    engine.see([0.0] * PROMPT + [9.0], 0)
    live = engine.case.monitor.get("a")
    assert live is not None
    assert live.action is (ActionCode.STEER if steered else ActionCode.ALLOW)
    assert bool(engine.schedule(1, computed=PROMPT + 1)) == steered
    assert {key[2] for key in engine.case.monitor.take_tally().acted} == {Mode.ENFORCE if steered else Mode.SHADOW}


def by_rule(folder: Path) -> Engine:
    """With a condition that no single row decides."""
    return Engine(compiled(folder, CALM, do("r", STEER, when="aggregate: {kind: last}, above: {value: 2}")))


def by_gate(
    folder: Path, *, stage: str = "stream", positions: str = "generated", kind: str = "latched", ahead: bool = False
) -> Engine:
    """With a condition that one row decides."""
    steers = CALM.replace("cap", f"cap, positions: {positions}")
    plan = compiled(folder, steers, do("r", STEER.replace("latched", kind), stage=stage))
    return Engine(plan, ahead=ahead)


def always(folder: Path, steers: str = ALL, policy: str = "steers: [calm]") -> Engine:
    return Engine(compiled(folder, steers, policy=policy))


def hashes(request: Request, generated: int = 0) -> list[Any]:
    """Of all full blocks, once so many more tokens have been generated; the n-th is the same for every request."""
    for _ in range(generated):
        request.append_output_token_ids(500 + request.num_output_tokens)
    return list(request.block_hashes)


def test_a_rules_steer_begins_with_the_first_row_that_was_not_judged(tmp_path: Path) -> None:
    engine = by_rule(tmp_path)
    engine.admit()
    assert engine.schedule(PROMPT, computed=0) == ()
    engine.see([0.0] * PROMPT, 0)
    assert engine.schedule(1, computed=PROMPT) == ()
    engine.see([9.0], PROMPT)
    order = SteerOrder(0, PROMPT + 1, END)
    assert engine.schedule(1, computed=PROMPT + 1) == (order,)
    engine.see([9.0], PROMPT + 1)
    assert engine.schedule(1, computed=PROMPT + 2) == (order,)


def test_rows_that_are_under_way_when_a_rule_fires_stay_as_they_were_sent(tmp_path: Path) -> None:
    engine = by_rule(tmp_path)
    engine.admit()
    engine.schedule(PROMPT, computed=0)
    engine.see([0.0] * PROMPT, 0)
    engine.schedule(1, computed=PROMPT)
    assert engine.schedule(1, computed=PROMPT + 1) == ()  # asynchronous: before the result of the step before
    engine.see([9.0], PROMPT)
    assert engine.schedule(1, computed=PROMPT + 2) == (SteerOrder(0, PROMPT + 2, END),)


def test_a_preemption_before_and_after_the_first_steered_step_changes_nothing(tmp_path: Path) -> None:
    engine = by_rule(tmp_path)
    engine.admit()
    engine.schedule(PROMPT, computed=0)
    engine.see([0.0] * PROMPT, 0)
    for position in range(PROMPT, PROMPT + 3):
        engine.schedule(1, computed=position)
        engine.see([9.0 if position == PROMPT + 2 else 0.0], position)
    # Preempted now: its unsteered rows are computed again, with the first steered one behind them.
    order = SteerOrder(0, PROMPT + 3, END)
    assert engine.schedule(PROMPT + 4, computed=0) == (order,)
    assert engine.schedule(PROMPT + 6, computed=0) == (order,)


def limit(engine: Engine) -> float:
    return float(engine.plan.steering.gates[0].limit(Format.CHAT) or 0.0)


def test_a_gate_is_watched_until_a_row_has_opened_it(tmp_path: Path) -> None:
    engine = by_gate(tmp_path)
    engine.admit()
    watch = GateOrder(0, limit(engine), (PROMPT, END), (PROMPT, END))
    assert engine.schedule(PROMPT, computed=0) == (watch,)
    engine.see([9.0] * PROMPT, 0)  # rows that the stage does not read
    assert engine.schedule(1, computed=PROMPT) == (watch,)
    engine.see([9.0], PROMPT)
    order = SteerOrder(0, PROMPT + 1, END)
    assert engine.schedule(1, computed=PROMPT + 1) == (order,)
    assert engine.schedule(PROMPT + 2, computed=0) == (order,)  # preempted
    assert engine.case.state() == ("steer", "r")


def test_a_prompt_that_opens_no_gate_costs_nothing_afterwards(tmp_path: Path) -> None:
    engine = by_gate(tmp_path, stage="prompt", positions="all")
    engine.admit()
    watch = GateOrder(0, limit(engine), (1, PROMPT), (2, END))
    assert engine.schedule(PROMPT - 1, computed=0) == (watch,)
    engine.see([0.0] * (PROMPT - 1), 0)
    assert engine.schedule(1, computed=PROMPT - 1) == (watch,)
    assert engine.schedule(1, computed=PROMPT) == (watch,)  # the last row of the prompt is not known yet
    engine.see([0.0], PROMPT - 1)
    assert engine.schedule(1, computed=PROMPT + 1) == ()
    assert engine.schedule(PROMPT + 1, computed=0) == (watch,)  # preempted: read again


def test_a_cached_prefix_opens_a_gate_before_the_rows_behind_it_are_scheduled(tmp_path: Path) -> None:
    engine = by_gate(tmp_path, stage="prompt", positions="all")
    engine.admit()
    assert engine.book.gated(["a", "b"]) == ["a"]
    engine.book.replayed("a", engine.case.script.rows([0.0, 0.0, 9.0, 0.0]))
    assert engine.schedule(PROMPT - SIZE, computed=SIZE) == (SteerOrder(0, 3, END),)


@pytest.mark.parametrize(
    ("positions", "ahead", "needed"), [("all", False, True), ("generated", False, False), ("generated", True, True)]
)
def test_only_what_the_next_rows_hang_on_has_to_be_filed(
    tmp_path: Path, positions: str, ahead: bool, needed: bool
) -> None:
    engine = by_gate(tmp_path, stage="prompt", positions=positions, ahead=ahead)
    engine.admit()
    assert engine.book.needs_filed("a") is needed
    assert not engine.book.needs_filed("b")


@pytest.mark.parametrize("kind", ["latched", "token"])
def test_prompts_with_gates_share_blocks_with_their_like_and_replies_with_nobody(tmp_path: Path, kind: str) -> None:
    engine = by_gate(tmp_path, stage="prompt", positions="all", kind=kind)
    first, second = (hashes(engine.admit(name), generated=8) for name in "ab")
    whole = PROMPT // SIZE
    assert first[:whole] == second[:whole]
    assert not set(first[whole:]) & set(second[whole:])
    plain = get_request_block_hasher(SIZE, sha256)
    unsteered = Request("u", list(range(PROMPT)), SamplingParams(max_tokens=5), None, block_hasher=plain)
    assert not set(first) & set(hashes(unsteered, generated=8))


@pytest.mark.parametrize(("kind", "shared"), [("latched", 3), ("token", 2)])
def test_a_reply_is_shared_up_to_the_first_row_that_is_written_to(tmp_path: Path, kind: str, shared: int) -> None:
    engine = by_gate(tmp_path, kind=kind)
    engine.admit("a")
    (clean, hot) = (engine.admit(name) for name in "bc")
    engine.see([0.0] * PROMPT, 0, "c")
    engine.see([0.0, 9.0], PROMPT, "c")  # the row at 11 ends the third block
    left, right = hashes(clean, generated=10), hashes(hot, generated=10)
    assert left[:shared] == right[:shared]
    assert not set(left[shared:]) & set(right[shared:])


def test_a_step_that_was_lost_shares_nothing(tmp_path: Path) -> None:
    engine = by_gate(tmp_path)
    clean, lost = (engine.admit(name) for name in "ab")
    engine.see([0.0] * PROMPT, 0, "b")
    engine.book.lost(["b", "unknown"])
    left, right = hashes(clean, generated=10), hashes(lost, generated=10)
    assert left[:2] == right[:2]
    assert not set(left[2:]) & set(right[2:])


def test_rows_that_a_gate_should_have_written_to_are_gaps(tmp_path: Path) -> None:
    engine = by_gate(tmp_path, stage="prompt", positions="all", kind="token")
    engine.admit()
    scores = [0.0, 9.0, 0.0, 9.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0]
    engine.see(scores, 0)
    rows = engine.case.script.rows(scores)
    doses = np.zeros((PROMPT, 1), dtype=np.float32)
    doses[3], doses[5] = 2.5, np.nan
    engine.book.tell(engine.case.script.step([("a", range(PROMPT), rows)]), doses, engine.case.monitor)
    request = engine.case.monitor.get("a")
    assert request is not None
    assert (request.doses[0].tokens, request.doses[0].largest) == (1, 0.5)
    assert request.gaps == {Gap.NOT_STEERED: 1}


def test_requests_with_the_same_steers_share_blocks_with_each_other_alone(tmp_path: Path) -> None:
    engine = always(tmp_path)
    plain = get_request_block_hasher(SIZE, sha256)
    unsteered = Request("u", list(range(PROMPT)), SamplingParams(max_tokens=5), None, block_hasher=plain)
    first, second = (hashes(engine.admit(name), generated=8) for name in "ab")
    assert first == second
    assert len(first) == (PROMPT + 8) // SIZE
    assert not set(first) & set(hashes(unsteered, generated=8))
    assert not set(first) & set(hashes(engine.admit("c", salt="tenant"), generated=8))
    # Nobody can send the salt that another engine, or a look at the code, would give.
    assert not set(first) & set(hashes(always(tmp_path).admit(), generated=8))


def test_another_strength_is_another_salt(tmp_path: Path) -> None:
    engine = always(tmp_path, policy="on_request: [calm]")
    full, half, none = (
        hashes(engine.admit(name, asked=asked))
        for name, asked in (("a", {"calm": 1.0}), ("b", {"calm": 0.5}), ("c", {}))
    )
    assert len({*full, *half, *none}) == 3 * (PROMPT // SIZE)
    assert engine.schedule(PROMPT, computed=0, name="b") == (SteerOrder(0, 2, END, 0.5),)
    assert engine.schedule(PROMPT, computed=0, name="c") == ()


@pytest.mark.parametrize("positions", ["generated", "prompt"])
def test_blocks_with_rows_that_are_written_to_by_their_place_are_private(tmp_path: Path, positions: str) -> None:
    engine = always(tmp_path, ALL.replace("all", positions))
    first, second = (hashes(engine.admit(name), generated=8) for name in "ab")
    whole = PROMPT // SIZE
    assert first[:whole] == second[:whole]
    assert not set(first[whole:]) & set(second[whole:])


def test_a_rule_that_has_not_fired_costs_no_shared_block_and_one_that_has_only_those_behind(tmp_path: Path) -> None:
    engine = by_rule(tmp_path)
    unsteered = [hashes(engine.admit(name), generated=14) for name in "ab"]
    assert unsteered[0] == unsteered[1]
    engine.admit("c")
    engine.see([0.0] * PROMPT, 0, "c")
    request = engine.requests["c"]
    before = hashes(request, generated=3)
    assert before == unsteered[0][: len(before)]
    engine.see([0.0, 0.0, 9.0], PROMPT, "c")
    behind = hashes(request, generated=11)
    shared = (PROMPT + 3) // SIZE
    assert behind[:shared] == before
    assert len(behind) == 6
    assert not set(behind[shared:]) & set(unsteered[0])


def test_doses_are_told_once_in_median_norms(tmp_path: Path) -> None:
    engine = always(tmp_path)
    engine.admit()
    engine.case.see([0.0] * PROMPT)
    doses = np.full((PROMPT, 1), 2.5, dtype=np.float32)
    doses[:2] = 0.0  # a sink is never written to
    doses[7] = 0.0  # below the ceiling
    engine.tell(range(PROMPT), doses)
    engine.tell(range(PROMPT), doses)  # computed again
    request = engine.case.monitor.get("a")
    assert request is not None
    assert (request.doses[0].tokens, request.doses[0].mean, request.doses[0].largest) == (7, 0.5, 0.5)
    assert not request.gaps
    assert engine.case.monitor.take_tally().steered == {"calm": 7}


@pytest.mark.parametrize("how", ["none", "nan", "shape"])
def test_rows_that_were_not_written_to_are_gaps(tmp_path: Path, how: str) -> None:
    engine = always(tmp_path)
    engine.admit()
    engine.case.see([0.0] * PROMPT)
    doses = {
        "none": None,
        "nan": np.full((PROMPT, 1), np.nan, dtype=np.float32),
        "shape": np.zeros((PROMPT, 2), dtype=np.float32),
    }[how]
    engine.tell(range(PROMPT), doses)
    request = engine.case.monitor.get("a")
    assert request is not None
    assert request.gaps == {Gap.NOT_STEERED: PROMPT - 2}
    assert engine.case.state() == ("flag", "on_gap")


def test_what_has_ended_is_forgotten(tmp_path: Path) -> None:
    engine = always(tmp_path)
    engine.admit()
    assert not engine.book.is_empty
    engine.book.forget("a")
    assert engine.book.is_empty
    assert engine.schedule(PROMPT, computed=0) == ()
