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
from monitor.types import Gap
from probes.steering.steer import END
from serving.engine.steer_order import STEERS, SteerOrder
from serving.engine.steerbook import SteerBook
from tests.unit.script import Case
from tests.unit.test_steers import CALM, STEER, compiled, do

SIZE = 4
PROMPT = 10
ALL = CALM.replace("cap", "cap, strength: 0.5, positions: all")


class Engine:
    """A book, a monitor and the requests that both know."""

    def __init__(self, plan: Plan) -> None:
        init_none_hash(sha256)
        self.plan = plan
        self.book = SteerBook(plan, block_size=SIZE)
        self.case = Case(plan)
        self.requests: dict[str, Request] = {}

    def admit(
        self, name: str = "a", *, salt: str | None = None, asked: Mapping[str, float] | None = None, first: int = 0
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
        self.case.admit(name, num_prompt=PROMPT)
        self.book.admit(request, self.plan.policies[0], asked or {})
        return request

    def schedule(self, count: int, *, computed: int, name: str = "a") -> tuple[SteerOrder, ...]:
        """vLLM has counted the step's tokens as computed by then."""
        self.requests[name].num_computed_tokens = computed + count
        step = SimpleNamespace(num_scheduled_tokens={name: count})
        self.book.scheduled(step, self.requests)
        return dict(getattr(step, STEERS, {})).get(name, ())

    def see(self, scores: list[float], start: int, name: str = "a") -> None:
        self.case.see(scores, start, name)
        self.book.judged([name], self.case.monitor)

    def tell(self, positions: range, doses: np.ndarray | None, name: str = "a") -> None:
        rows = self.case.script.rows([0.0] * len(positions))
        self.book.tell(self.case.script.step([(name, positions, rows)]), doses, self.case.monitor)


def by_rule(folder: Path, stage: str = "stream") -> Engine:
    return Engine(compiled(folder, CALM, do("r", STEER, stage=stage)))


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
