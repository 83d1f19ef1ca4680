"""The scheduler's side of canaries: rows are found by position whatever the steps; a fault ends with its request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from monitor.config import CanarySettings
from monitor.monitor import StepReadouts
from monitor.policy import Plan
from probes.artifact import Artifact
from probes.card import Canary
from serving.engine.faulty import faulty_requests, without
from serving.engine.heartbeat import Heartbeat
from serving.engine.readouts import WorkerReadouts
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, rule, unit_artifact

TOKENS = tuple(range(3, 15))
SCORES = np.linspace(-3, 3, len(TOKENS))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    canary = Canary(tokens=TOKENS, scores=tuple(SCORES[1:]), tolerance=0.05, reference="by hand")
    card = make_card(skip_first=1, calibrations=[calibration()]).model_copy(update={"canary": canary})
    artifacts: dict[str, Artifact] = {"harm": unit_artifact(card)}
    return plan_of(tmp_path, policy_text(rule("r")), artifacts)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def heartbeat(plan: Plan, clock: Clock) -> Heartbeat:
    return Heartbeat(plan, CanarySettings(every="60s", deadline="10s"), vocab=100, clock=clock)


def rows(plan: Plan, scores: np.ndarray) -> np.ndarray:
    readouts = np.zeros((len(scores), plan.bank.width), dtype=np.float32)
    readouts[:, 0] = scores
    return readouts


def sent(plan: Plan, *parts: tuple[str, Sequence[int], np.ndarray]) -> WorkerReadouts:
    return WorkerReadouts(
        [name for name, _, _ in parts],
        np.array([len(positions) for _, positions, _ in parts], dtype=np.int64),
        np.concatenate([np.asarray(positions, dtype=np.int64) for _, positions, _ in parts]),
        np.concatenate([rows(plan, scores) for _, _, scores in parts]),
    )


@pytest.mark.covers("canary requests", "isolation")
@pytest.mark.parametrize("size", [1, 5, len(TOKENS)])
def test_it_passes_in_any_chunks_and_among_others(plan: Plan, heartbeat: Heartbeat, size: int) -> None:
    heartbeat.admit("c", TOKENS)
    for start in range(0, len(TOKENS), size):
        heartbeat.scheduled(["other", "c"])
        positions = range(start, min(start + size, len(TOKENS)))
        assert not heartbeat.status()["passed"]
        step = sent(plan, ("other", range(3), np.full(3, np.nan)), ("c", positions, SCORES[list(positions)]))
        assert heartbeat.take(step) is None
    status = heartbeat.status()
    assert status == {"failure": None, "passed": True, "waiting": False, "deviation": status["deviation"]}
    assert status["deviation"] < 1
    heartbeat.finish("c", aborted=False)
    assert heartbeat.status()["passed"]


@pytest.mark.covers("canary: corrupted weights", "noticed")
def test_a_wrong_score_fails_in_the_very_step_that_shows_it(plan: Plan, heartbeat: Heartbeat) -> None:
    heartbeat.admit("c", TOKENS)
    heartbeat.scheduled(["c"])
    wrong = SCORES.copy()
    wrong[7] += 0.06
    failed = heartbeat.take(sent(plan, ("c", range(len(TOKENS)), wrong)))
    assert failed is not None
    assert "'harm' at position 7" in failed.detail
    heartbeat.finish("c", aborted=False)
    assert heartbeat.status()["failure"] == ["wrong_scores", failed.detail]


def test_a_readout_that_no_score_uses_must_be_finite_too(plan: Plan, heartbeat: Heartbeat) -> None:
    heartbeat.admit("c", TOKENS)
    step = sent(plan, ("c", range(len(TOKENS)), SCORES))
    step.readouts[4, plan.bank.norm_column(plan.bank.taps[0])] = np.nan
    failed = heartbeat.take(step)
    assert failed is not None
    assert failed.reason == "not_finite"


@pytest.mark.covers("canary: without readouts", "noticed")
def test_a_canary_that_ends_without_all_its_rows_was_not_seen(plan: Plan, heartbeat: Heartbeat) -> None:
    heartbeat.admit("c", TOKENS)
    heartbeat.scheduled(["c"])
    assert heartbeat.take(sent(plan, ("c", range(4), SCORES[:4]))) is None
    assert heartbeat.take(None) is None
    heartbeat.finish("c", aborted=False)
    failed = heartbeat.take(None)
    assert failed is not None
    assert failed.reason == "not_seen"


@pytest.mark.covers("canary: late", "noticed")
def test_a_late_canary_fails_while_it_runs_and_when_it_has_ended(
    plan: Plan, heartbeat: Heartbeat, clock: Clock
) -> None:
    heartbeat.admit("c", TOKENS)
    clock.now = 100.0
    assert heartbeat.take(None) is None  # it waits in the queue
    heartbeat.scheduled(["c"])
    clock.now = 111.0
    failed = heartbeat.take(sent(plan, ("c", range(len(TOKENS)), SCORES)))
    assert failed is not None
    assert failed.reason == "late"


def test_a_detector_that_fails_on_a_canary_fails_it(
    plan: Plan, heartbeat: Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(readouts: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    monkeypatch.setattr(plan.bank, "score", fail)
    heartbeat.admit("c", TOKENS)
    failed = heartbeat.take(sent(plan, ("c", range(len(TOKENS)), SCORES)))
    assert failed is not None
    assert failed.reason == "error"


@pytest.mark.covers("exception in the monitor", "isolation")
def test_requests_that_cannot_be_scored_are_found_and_taken_out(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    score = plan.bank.score

    def picky(readouts: np.ndarray) -> np.ndarray:
        if (readouts[:, 0] == 13).any():
            raise ZeroDivisionError
        return score(readouts)

    monkeypatch.setattr(plan.bank, "score", picky)
    counts = np.array([2, 1, 0, 3])
    values = np.array([1, 2, 13, 4, 5, 6])
    step = StepReadouts(
        ["a", "bad", "none", "b"], counts, np.cumsum(counts) - counts, np.arange(6) + 7, rows(plan, values)
    )
    assert faulty_requests(step, plan.bank) == {"bad"}
    rest = without(step, {"bad"})
    assert rest.request_ids == ["a", "none", "b"]
    assert rest.counts.tolist() == [2, 0, 3]
    assert rest.starts.tolist() == [0, 2, 2]
    assert rest.positions.tolist() == [7, 8, 10, 11, 12]
    assert rest.readouts[:, 0].tolist() == [1, 2, 4, 5, 6]


@pytest.mark.covers("ngram drafts", "isolation")
def test_rejected_draft_rows_at_the_end_of_a_request_stay_out(plan: Plan) -> None:
    """Counts may be smaller than the distance to the next start."""
    step = StepReadouts(
        ["a", "b"], np.array([1, 1]), np.array([0, 3]), np.arange(5), rows(plan, np.arange(5, dtype=float))
    )
    assert without(step, {"a"}).readouts[:, 0].tolist() == [3]
    assert without(step, {"b"}).positions.tolist() == [0]
