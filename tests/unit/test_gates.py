"""Gates: whatever way a request is cut into steps, drafted or told late, the same rows of it are written to."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.check import Check
from monitor.gates import SteerGate
from monitor.rule import Gate
from probes.aggregate.max import Max
from probes.card import Format, Stage
from probes.steering.steer import END
from probes.taps import Tap
from serving.engine.gates import GateSet, GateSite, StepRows
from serving.engine.open_gates import OpenGate
from serving.engine.steer_order import GateOrder, SteerOrder
from serving.engine.steered_request import SteeredRequest

LIMIT = 1.0
PROMPT, LENGTH = 7, 14
MAX_ROWS, MAX_REQUESTS = 64, 4


def gate_at(stage: Stage, kind: Gate, threshold: float = LIMIT) -> SteerGate:
    check = Check("harm", stage, Max(), 1, MappingProxyType({Format.CHAT: threshold}))
    return SteerGate(0, kind, check, Tap(0), column=2, offset=2)


def opened(gate: SteerGate, span: tuple[int, int], fmt: Format = Format.CHAT) -> OpenGate | None:
    return OpenGate.of(0, gate, fmt, span, num_prompt=PROMPT, stream_from=PROMPT - 1)


def naive(gate: SteerGate, span: tuple[int, int], scores: np.ndarray) -> list[bool]:
    """The definition: rows of the span that open the gate, or that lie behind the first that does."""
    start, stop = gate.reads(PROMPT, PROMPT - 1)
    hot = [start <= position < stop and score > LIMIT for position, score in enumerate(scores)]
    inside = [span[0] <= position < span[1] for position in range(len(scores))]
    if gate.kind is Gate.TOKEN:
        return [here and within for here, within in zip(hot, inside, strict=True)]
    return [any(hot[:position]) and within for position, within in enumerate(inside)]


@given(threshold=st.floats(-1e6, 1e6), steps=st.integers(-3, 3))
def test_a_float32_readout_lies_above_the_limit_exactly_if_it_lies_above_the_threshold(
    threshold: float, steps: int
) -> None:
    readout = np.float32(threshold)
    for _ in range(abs(steps)):
        readout = np.nextafter(readout, np.float32(np.sign(steps) * np.inf))
    limit = gate_at(Stage.PROMPT, Gate.TOKEN, threshold).limit(Format.CHAT)
    assert limit is not None
    assert bool(readout > limit) is (float(readout) > threshold)


def test_a_format_without_a_threshold_opens_nothing() -> None:
    gate = gate_at(Stage.PROMPT, Gate.TOKEN)
    assert gate.limit(Format.RAW) is None
    assert opened(gate, (1, END), Format.RAW) is None


@dataclass
class _Step:
    """What was sent to a worker and has not come back."""

    first: int
    kept: int
    readouts: np.ndarray


class Sim:
    """A scheduler and a worker with one gate; the numbers that are read stand in for a model.

    Args:
        gate: of every request.
        span: that its steer may write to.
        lag: 0 if the result of a step is known when the next one is scheduled, 1 if not.
    """

    def __init__(self, gate: SteerGate, span: tuple[int, int], lag: int) -> None:
        self.readouts = torch.full((MAX_ROWS, 4), float("nan"))
        rows = StepRows(torch.zeros(MAX_ROWS, dtype=torch.int64), torch.zeros(MAX_ROWS, dtype=torch.int64))
        self.site = GateSite([0], [gate], [1], readouts=self.readouts, rows=rows, max_requests=MAX_REQUESTS)
        self.gates = GateSet([self.site], 1, rows)
        self.gate, self.span, self.lag = gate, span, lag

    def run(self, requests: list[np.ndarray], cuts: list[list[tuple[int, int]]], order: np.random.Generator) -> None:
        """Run requests side by side.

        Args:
            requests: scores of each, LENGTH of them.
            cuts: of each, its steps: how many rows are kept, how many further drafts are rejected.
            order: in which the rows of the requests stand.
        """
        states = [SteeredRequest([], None, [g for g in [opened(self.gate, self.span)] if g]) for _ in requests]
        done, expected_done = [0] * len(requests), [0] * len(requests)
        flight: list[dict[int, _Step]] = []
        self.written = [np.zeros(len(scores), dtype=bool) for scores in requests]
        self.due = [np.zeros(len(scores), dtype=bool) for scores in requests]
        for number in range(max(len(cut) for cut in cuts)):
            while len(flight) > self.lag:
                self._return(flight.pop(0), states)
            batch = [int(r) for r in order.permutation(len(requests)) if number < len(cuts[r])]
            # A scheduler that is ahead believes that every draft will be kept.
            orders = {str(r): states[r].ordered(expected_done[r] if self.lag else done[r]) for r in batch}
            sent: dict[int, _Step] = {}
            counts, positions, scores = [], [], []
            for r in batch:
                kept, rejected = cuts[r][number]
                place = done[r] + np.arange(kept + rejected)
                values = np.concatenate([requests[r][done[r] : done[r] + kept], order.normal(2.0, 2.0, rejected)])
                counts.append(kept + rejected)
                positions.append(place)
                scores.append(values)
                rows = np.zeros((kept, 4), dtype=np.float32)
                rows[:, 2] = values[:kept]
                sent[r] = _Step(done[r], kept, rows)
                expected_done[r] += kept + rejected
            scale = self._pass(orders, batch, np.array(counts), np.concatenate(positions), np.concatenate(scores))
            starts = np.cumsum(counts) - counts
            for place, r in enumerate(batch):
                step = sent[r]
                wrote = scale[starts[place] : starts[place] + step.kept] > 0
                self.written[r][step.first : step.first + step.kept] = wrote
                done[r] += step.kept
                expected_done[r] = done[r] if not self.lag else expected_done[r]
            flight.append(sent)
        for left in flight:
            self._return(left, states)

    def _pass(
        self,
        orders: dict[str, list[SteerOrder | GateOrder]],
        batch: list[int],
        counts: np.ndarray,
        positions: np.ndarray,
        scores: np.ndarray,
    ) -> np.ndarray:
        total = len(positions)
        self.readouts[:total, 2] = torch.from_numpy(scores).float()
        starts = torch.from_numpy(np.cumsum(counts) - counts)
        segment = torch.from_numpy(np.repeat(np.arange(len(batch)), counts))
        self.gates.arm(orders, [str(r) for r in batch], starts, segment, torch.from_numpy(positions))
        scale = torch.zeros(MAX_ROWS, 2)
        row_request = np.repeat(batch, counts)
        for row, (request, position) in enumerate(zip(row_request, positions, strict=True)):
            for found in orders[str(request)]:
                if isinstance(found, SteerOrder) and found.start <= position < found.stop:
                    scale[row, 1] = found.scale
        self.site(scale, total)
        self.readouts.fill_(float("nan"))
        assert (scale[:, 0] == 0).all()
        return scale[:total, 1].numpy()

    def _return(self, steps: dict[int, _Step], states: list[SteeredRequest]) -> None:
        for r, step in steps.items():
            positions = step.first + np.arange(step.kept)
            states[r].see(positions, step.readouts)
            for rows in states[r].due(positions, step.readouts).values():
                self.due[r][positions] |= rows


@st.composite
def cut_up(draw: st.DrawFn, *, drafts: bool) -> list[tuple[int, int]]:
    """Steps that make LENGTH rows: chunks of the prompt, then tokens, with drafts behind them."""
    steps, done = [], 0
    while done < PROMPT:
        kept = draw(st.integers(1, PROMPT - done))
        steps.append((kept, 0))
        done += kept
    while done < LENGTH:
        kept = draw(st.integers(1, min(3, LENGTH - done))) if drafts else 1
        steps.append((kept, draw(st.integers(0, 3)) if drafts else 0))
        done += kept
    return steps


CASES = [
    (Stage.PROMPT, Gate.LATCHED, (1, END)),
    (Stage.PROMPT, Gate.LATCHED, (1, PROMPT)),
    (Stage.PROMPT, Gate.LATCHED, (PROMPT, END)),
    (Stage.PROMPT, Gate.TOKEN, (1, END)),
    (Stage.STREAM, Gate.LATCHED, (PROMPT, END)),
    (Stage.STREAM, Gate.TOKEN, (PROMPT, END)),
]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("stage", "kind", "span"), CASES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_chunks_drafts_and_late_results_change_nothing(
    data: st.DataObject, stage: Stage, kind: Gate, span: tuple[int, int], lag: int
) -> None:
    gate = gate_at(stage, kind)
    seed = data.draw(st.integers(0, 2**16))
    generator = np.random.default_rng(seed)
    requests = [generator.normal(-0.6, 1.0, LENGTH).astype(np.float32) for _ in range(3)]
    cuts = [data.draw(cut_up(drafts=True)) for _ in requests]
    sim = Sim(gate, span, lag)
    sim.run(requests, cuts, generator)
    for scores, written, due in zip(requests, sim.written, sim.due, strict=True):
        expected = naive(gate, span, scores)
        assert written.tolist() == expected
        # What has to have been written to is known to the scheduler, row by row, so that a miss is a gap.
        assert due.tolist() == expected


def test_a_step_without_gates_leaves_nothing_behind() -> None:
    gate = gate_at(Stage.STREAM, Gate.LATCHED)
    sim = Sim(gate, (PROMPT, END), lag=1)
    hot = np.full(LENGTH, 5.0, dtype=np.float32)
    sim.run([hot], [[(LENGTH, 0)]], np.random.default_rng(0))
    sim.gates.disarm()
    scale = torch.zeros(MAX_ROWS, 2)
    sim.readouts[:, 2] = 5.0
    sim.site(scale, 3)
    assert not scale.any()


def test_the_operator_survives_compilation() -> None:
    gate = gate_at(Stage.PROMPT, Gate.LATCHED)
    rows = StepRows(torch.arange(MAX_ROWS), torch.zeros(MAX_ROWS, dtype=torch.int64))
    readouts = torch.zeros(MAX_ROWS, 4)
    site = GateSite([0], [gate], [0], readouts=readouts, rows=rows, max_requests=MAX_REQUESTS)
    site.bar[:] = LIMIT
    site.room[:] = 1.0
    readouts[3, 2] = 2.0
    plain, compiled = torch.zeros(MAX_ROWS, 1), torch.zeros(MAX_ROWS, 1)
    site(plain, 8)
    site.latch.fill_(END)
    torch.compile(site, backend="aot_eager", fullgraph=True)(compiled, 8)
    assert torch.equal(plain, compiled)
    assert plain[:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * (MAX_ROWS - 8)
    assert int(site.latch[0, 0]) == 3
