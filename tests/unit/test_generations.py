"""Reloads between requests: each request is judged as by a monitor that only ever had its plan, whatever is loaded."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreOutputs

from monitor.generations import GRACE_SECONDS, Generations, part_of
from monitor.monitor import Monitor, StepReadouts
from monitor.policy import Plan, compile_plan
from monitor.types import Gap
from probes.card import Format, Stage
from probes.columns import NoRoomError, Room, union
from probes.taps import Tap
from serving.engine.carrier import take_reports
from serving.engine.records import Records
from serving.engine.reporting import Reporting
from tests.unit.artifacts import (
    D_MODEL,
    NUM_LAYERS,
    calibration,
    make_card,
    policy_text,
    rule,
    unit_artifact,
    write_policy,
)
from tests.unit.script import chat

CAPACITY = 3
NAMES = ("a", "b", "c", "d")
ARTIFACTS = {
    name: unit_artifact(
        make_card(name, calibrations=[calibration(Stage.STREAM), calibration(Stage.PROMPT)]), dimension=number
    )
    for number, name in enumerate(NAMES)
}
POLICIES = (("a",), ("b", "a"), ("c",), ("d", "b"), ("a", "c", "d"), ("b",))


def plan_of(names: tuple[str, ...], room: Room | None = None) -> Plan:
    rules = [
        rule(f"{stage}-{name}", detector=name, stage=stage, action=action)
        for name, stage, action in zip(names, ("prompt", "stream", "stream"), ("flag", "block", "flag"), strict=False)
    ]
    text = policy_text("\n".join(rules), head=f"reserve: {{directions: {CAPACITY}}}\n", names=names)
    with TemporaryDirectory() as folder:
        file = write_policy(Path(folder), text)
    artifacts = {name: ARTIFACTS[name] for name in names}
    return compile_plan(file, artifacts, d_model=D_MODEL, num_layers=NUM_LAYERS, room=room)


ALONE = {names: plan_of(names) for names in POLICIES}


class Engine:
    """A device with a few columns, an engine's generations, and one monitor of its own for each request."""

    def __init__(self) -> None:
        self.now = 0.0
        first = plan_of(POLICIES[0])
        self.generations = Generations(first, clock=lambda: self.now)
        self.weight, self.bias = first.bank.matrices[0].weight.copy(), first.bank.matrices[0].bias.copy()
        self.names = {first.digest: POLICIES[0]}
        self.live: dict[str, tuple[Plan, Monitor, int]] = {}
        self.judged = 0
        self.refused = 0

    def reload(self, names: tuple[str, ...]) -> None:
        self.generations.release()
        held = self.generations.plans
        taken = union(*(plan.bank.residents() for plan in held.values()))
        try:
            plan = plan_of(names, Room((Tap(0),), taken))
        except NoRoomError:
            self.refused += 1
            return
        plan = held.get(plan.digest, plan)
        columns = [column for column in plan.bank.residents()[Tap(0)] if column not in taken[Tap(0)]]
        self.weight[:, columns] = plan.bank.matrices[0].weight[:, columns]
        self.bias[columns] = plan.bank.matrices[0].bias[columns]
        self.generations.add(plan)
        self.generations.commit(plan.digest)
        self.names[plan.digest] = names

    def begin(self, name: str, num_prompt: int) -> None:
        shared = self.generations.monitor_of(self.generations.plan.digest)
        settings: dict[str, Any] = {"num_prompt": num_prompt, "policy": None, "fmt": Format.CHAT}
        self.generations.keep(shared.admit(name, **settings, prompt=chat(num_prompt)))
        alone = ALONE[self.names[shared.plan.digest]]
        monitor = Monitor(alone)
        monitor.admit(name, **settings, prompt=chat(num_prompt))
        self.live[name] = alone, monitor, 0

    def step(self, activations: dict[str, np.ndarray]) -> None:
        rows, counts, positions = [], [], []
        for name, found in activations.items():
            alone, monitor, seen = self.live[name]
            matrix = alone.bank.matrices[0]
            own = _readouts(found, matrix.weight, matrix.bias)
            places = np.arange(seen, seen + len(found))
            monitor.observe(_step([name], [len(found)], places, own))
            self.live[name] = alone, monitor, seen + len(found)
            rows.append(_readouts(found, self.weight, self.bias))
            counts.append(len(found))
            positions.append(places)
        if rows:
            self.generations.observe(_step(list(activations), counts, np.concatenate(positions), np.concatenate(rows)))

    def end(self, name: str) -> None:
        _, monitor, seen = self.live.pop(name)
        account = {"num_positions": seen + 1, "sampled": 1, "aborted": False}
        found = self.generations.finish(name, **account)
        expected = monitor.finish(name, **account)
        assert found is not None
        assert expected is not None
        np.testing.assert_array_equal(found.statistics, expected.statistics)
        np.testing.assert_array_equal(found.fired, expected.fired)
        assert (found.request.action, found.request.rule) == (expected.request.action, expected.request.rule)
        assert found.request.decided == expected.request.decided
        assert found.coverage == expected.coverage
        self.judged += 1


def _readouts(activations: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    products = activations @ weight + bias
    return np.column_stack([products, (activations**2).sum(axis=1)]).astype(np.float32)


def _step(names: list[str], counts: list[int], positions: np.ndarray, readouts: np.ndarray) -> StepReadouts:
    sizes = np.array(counts, dtype=np.int64)
    return StepReadouts(names, sizes, np.cumsum(sizes) - sizes, positions.astype(np.int64), readouts)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("reload"), st.sampled_from(POLICIES)),
        st.tuples(st.just("begin"), st.integers(1, 5)),
        st.tuples(st.just("step"), st.integers(0, 2**31 - 1)),
        st.tuples(st.just("end"), st.integers(0, 7)),
        st.tuples(st.just("wait"), st.sampled_from((1.0, GRACE_SECONDS + 1))),
    ),
    min_size=5,
    max_size=60,
)


@given(OPERATIONS)
@settings(max_examples=150, deadline=None)
def test_each_request_is_judged_as_by_a_monitor_that_only_ever_had_its_plan(operations: list[tuple[str, Any]]) -> None:
    engine = Engine()
    begun = 0
    for what, value in operations:
        if what == "reload":
            engine.reload(value)
        elif what == "begin":
            begun += 1
            engine.begin(f"r{begun}", value)
        elif what == "step" and engine.live:
            generator = np.random.default_rng(value)
            chosen = [name for name in engine.live if generator.random() < 0.7]
            # Small whole numbers: every product is exact, whatever column it stands in.
            engine.step({name: generator.integers(-2, 4, (int(generator.integers(1, 4)), D_MODEL)) for name in chosen})
        elif what == "end" and engine.live:
            engine.end(list(engine.live)[value % len(engine.live)])
        elif what == "wait":
            engine.now += value
    for name in list(engine.live):
        engine.end(name)
    engine.now += GRACE_SECONDS
    engine.generations.release()
    assert list(engine.generations.plans) == [engine.generations.plan.digest]
    assert engine.judged == begun


def test_a_column_is_free_only_when_the_last_request_that_may_read_it_has_ended() -> None:
    engine = Engine()
    engine.reload(("b", "a"))
    engine.begin("long", 2)
    engine.reload(("c",))
    engine.now += 100
    before = engine.weight.copy()
    engine.reload(("d", "b"))  # a, b and c are held: there is no column left for d
    assert engine.refused == 1
    np.testing.assert_array_equal(engine.weight, before)
    engine.end("long")
    engine.now += GRACE_SECONDS
    engine.reload(("d", "b"))
    assert engine.refused == 1
    assert engine.generations.plan.bank.residents()[Tap(0)].keys() & {0, 1, 2}


def test_a_plan_that_was_replaced_is_kept_for_requests_on_their_way() -> None:
    engine = Engine()
    old = engine.generations.plan.digest
    engine.reload(("c",))
    engine.now += GRACE_SECONDS - 1
    engine.generations.release()
    assert engine.generations.monitor_of(old).plan.digest == old
    engine.now += 1
    engine.generations.release()
    assert engine.generations.monitor_of(old).plan is engine.generations.plan  # what runs now judges the late one


def test_going_back_to_a_plan_that_still_has_requests_uses_its_columns() -> None:
    engine = Engine()
    first = engine.generations.plan
    engine.begin("long", 2)
    engine.reload(("c",))
    engine.reload(POLICIES[0])
    assert engine.generations.plan is first
    engine.now += 100
    engine.generations.release()
    assert list(engine.generations.plans) == [first.digest]


def test_gaps_doubts_and_counts_reach_the_monitor_of_each_request() -> None:
    engine = Engine()
    engine.begin("old", 2)
    engine.reload(("c",))
    engine.begin("new", 2)
    activations = np.ones((2, D_MODEL), dtype=np.int64)
    engine.step({"old": activations, "new": activations})
    generations = engine.generations
    before = generations.scored_of(["old", "new", "nobody"])
    assert before == {"old": 1, "new": 1}
    generations.lose({"old": 4, "new": 3, "nobody": 9}, Gap.NO_READOUTS)
    generations.distrust({"old": 0, "new": 1}, Gap.CANARY)
    tally = generations.take_tally()
    assert dict(tally.gaps) == {Gap.NO_READOUTS: 3, Gap.CANARY: 1}
    assert tally.scored == 1
    assert generations.take_tally().gaps.total() == 0
    assert {name: generations.positions_of(name) for name in ("old", "new", "nobody")} == {
        "old": 4, "new": 3, "nobody": 0,
    }  # fmt: skip
    assert generations.get("old").plan != generations.get("new").plan  # type: ignore[union-attr]


def test_a_candidate_that_is_not_wanted_leaves_nothing_behind() -> None:
    engine = Engine()
    current = engine.generations.plan
    other = plan_of(("c",), Room((Tap(0),), current.bank.residents()))
    engine.generations.add(other)
    engine.generations.discard(other.digest)
    engine.generations.discard(current.digest)
    assert list(engine.generations.plans) == [current.digest]


def test_a_part_of_a_step_has_the_rows_of_its_requests_in_order() -> None:
    step = _step(["x", "y", "z"], [2, 1, 3], np.arange(6), np.arange(12.0).reshape(6, 2))
    part = part_of(step, {"z", "x"})
    assert part.request_ids == ["x", "z"]
    assert (part.counts.tolist(), part.starts.tolist()) == ([2, 3], [0, 2])
    assert part.positions.tolist() == [0, 1, 3, 4, 5]
    assert part.readouts[:, 0].tolist() == [0, 2, 6, 8, 10]


def test_a_plan_has_the_same_digest_wherever_its_directions_stand() -> None:
    room = Room((Tap(0),), {Tap(0): {0: "somebody else's"}})
    moved = plan_of(("b", "a"), room)
    assert moved.bank.columns["b"][Tap(0)].tolist() == [1]
    assert moved.digest == ALONE["b", "a"].digest
    assert moved.digest != ALONE[("b",)].digest


def test_a_tap_that_is_not_in_place_is_named() -> None:
    with pytest.raises(NoRoomError, match=r"resid_post\.0 is to be read.*started with resid_post\.2") as caught:
        plan_of(("a",), Room((Tap(2),)))
    assert caught.value.setting == "detectors"


def test_reports_of_one_step_say_of_each_request_what_its_own_plan_calls_it() -> None:
    engine = Engine()
    old = engine.generations.plan
    reporting, records = Reporting(engine.generations), Records(old)

    def step(outputs: dict[int, EngineCoreOutputs]) -> None:
        requests: Any = {}
        reporting.attach(outputs, list(engine.live), requests)
        records.take_in(*take_reports(outputs[0].outputs)[0])

    def admit(name: str) -> Any:
        engine.begin(name, 2)
        request: Any = SimpleNamespace(request_id=name, client_index=0)
        reporting.admit(request)
        return request

    first = admit("old")
    engine.reload(("c",))
    new = engine.generations.plan
    records.hold({old.digest: old, new.digest: new})
    admit("new")
    activations = np.zeros((2, D_MODEL), dtype=np.int64)
    activations[1, 0] = 3  # what "a" reads, which the first plan flags in prompts
    engine.step({"old": activations, "new": activations})
    step({0: EngineCoreOutputs()})
    assert [record.plan for name in ("old", "new") if (record := records.get(name))] == [old, new]
    said = {name: records.get(name).describe() for name in ("old", "new")}  # type: ignore[union-attr]
    assert {name: part["detectors"][0]["name"] for name, part in said.items()} == {"old": "a", "new": "c"}
    assert {name: (part["action"], part["rule"]) for name, part in said.items()} == {
        "old": ("flag", "prompt-a"), "new": ("allow", None),
    }  # fmt: skip
    # It ends, and its plan is forgotten before anybody is told: what is told is still said of its own plan.
    ended = engine.generations.finish("old", num_positions=3, sampled=1, aborted=False)
    del engine.live["old"]
    reporting.end(first, ended)
    engine.now += 100
    engine.generations.release()
    assert list(engine.generations.plans) == [new.digest]
    step({0: EngineCoreOutputs()})
    record = records.get("old")
    assert record is not None
    assert (record.ended, record.plan, record.describe()["rule"]) == (True, old, "prompt-a")
    step({0: EngineCoreOutputs()})
    assert records.get("old") is None
    records.hold({})
    with pytest.raises(KeyError):
        step({0: EngineCoreOutputs()})
