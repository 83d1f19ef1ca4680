"""What is kept of each live request, in arrays: aggregate states, statistics, decisions. Decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from monitor.policy import Check
from monitor.segments import Codes, role_mask
from monitor.types import Action, ActionCode, Gap, PromptEvent, Role
from probes.aggregate import Aggregator
from probes.bank import Bank
from probes.card import Format, Stage

Float64 = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]


@dataclass(slots=True)
class Request:
    """One live request.

    Attributes:
        request_id: vLLM's internal id.
        slot: its row in the arrays.
        num_prompt: prompt tokens.
        policy: position of its policy in the plan.
        fmt: how its text reached the model.
        stream_from: position from which stream checks read.
        roles: (num_prompt,) role codes of the prompt; None if every check reads everything.
        events: what was noticed while its prompt was made.
        gaps: positions that should have been scored and were not, by reason.
        action: the most severe action so far.
        rule: what decided it; empty while the action is allow.
        text: what a blocked reply says.
        decided: rules (and reserved rule names) that have acted; each counts once.
    """

    request_id: str
    slot: int
    num_prompt: int
    policy: int
    fmt: Format
    stream_from: int
    roles: Codes | None = None
    events: tuple[PromptEvent, ...] = ()
    gaps: Counter[Gap] = field(default_factory=Counter)
    action: ActionCode = ActionCode.ALLOW
    rule: str = ""
    text: str = ""
    decided: set[str] = field(default_factory=set)

    def raise_to(self, action: Action, rule: str, text: str) -> None:
        """Take over an action if it is more severe than the present one."""
        code = ActionCode(action.severity)
        if code > self.action:
            self.action, self.rule, self.text = code, rule, text


@dataclass(frozen=True, slots=True)
class Reading:
    """What checks must share to be fed together."""

    stage: Stage
    aggregate: Aggregator
    skip_first: int
    segments: tuple[Role, ...] | None


class WatchGroup:
    """Checks that share stage, aggregate, skipped positions and segments: one array operation feeds them all."""

    def __init__(self, reading: Reading, checks: Index, detectors: Index) -> None:
        self.stage = reading.stage
        self.aggregate = aggregate = reading.aggregate
        self.skip_first = reading.skip_first
        self.has_segments = reading.segments is not None
        self._mask = role_mask(reading.segments or ())
        self.checks = checks
        self.detectors = detectors
        self.state = aggregate.new_state(0, len(checks))

    def reads(self, request: Request, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which positions of a request these checks read: (n,) in, (n,) out."""
        if self.stage is not Stage.PROMPT:
            return positions >= max(request.stream_from, self.skip_first)
        read = (positions < request.num_prompt) & (positions >= self.skip_first)
        if self.has_segments and request.roles is not None:
            read[read] = self._mask[request.roles[positions[read]]]
        return read

    def grow(self, num_slots: int) -> None:
        """Make room; states of live requests stay as they are."""
        fresh = self.aggregate.new_state(num_slots - self.state.shape[0], len(self.checks))
        self.state = np.concatenate([self.state, fresh])

    def reset(self, slot: int) -> None:
        """Fresh state for a slot."""
        self.state[slot] = self.aggregate.initial

    def feed(self, slots: Index, scores: Float64) -> Float64:
        """Feed T rows of each of R requests.

        Args:
            slots: (R,).
            scores: (T, R, number of detectors).
        Returns: (T, R, checks of this group), the running statistic.
        """
        state = self.state[slots]
        running = self.aggregate.update(state, scores[:, :, self.detectors])
        self.state[slots] = state
        return running


def group_checks(checks: Sequence[Check], bank: Bank) -> tuple[WatchGroup, ...]:
    """The fewest groups that cover all checks."""
    members: dict[Reading, list[int]] = {}
    for position, check in enumerate(checks):
        reading = Reading(check.stage, check.aggregate, check.skip_first, check.segments)
        members.setdefault(reading, []).append(position)
    return tuple(
        WatchGroup(
            reading,
            np.array(positions, dtype=np.intp),
            np.array([bank.index[checks[position].detector] for position in positions], dtype=np.intp),
        )
        for reading, positions in members.items()
    )


class StateTable:
    """Slots for live requests: handed out, grown when needed, reused when a request ends.

    Attributes:
        statistics: (slots, checks), the statistic that is judged: at prompt the value after the last prompt token,
            at stream the maximum so far, at response the value at the newest token; ``-inf`` while undefined.
        fired: (slots, checks).
        next_position: (slots,), the first position that is not accounted for; each position counts once.
        scored, sink: (slots,), positions so far.
        num_prompt: (slots,), prompt tokens.
        thresholds: (slots, checks), of the request's format; NaN where not calibrated, so that nothing fires.
    """

    def __init__(self, groups: Sequence[WatchGroup], num_checks: int, *, initial_slots: int = 64) -> None:
        self.groups = tuple(groups)
        self.statistics = np.empty((0, num_checks))
        self.fired = np.empty((0, num_checks), dtype=bool)
        self.thresholds = np.empty((0, num_checks))
        self.next_position = np.empty(0, dtype=np.int64)
        self.scored = np.empty(0, dtype=np.int64)
        self.sink = np.empty(0, dtype=np.int64)
        self.num_prompt = np.empty(0, dtype=np.int64)
        self._free: list[int] = []
        self._grow(initial_slots)

    def take(self, thresholds: Float64, num_prompt: int) -> int:
        """A fresh slot."""
        if not self._free:
            self._grow(2 * len(self.next_position))
        slot = self._free.pop()
        self.statistics[slot] = -np.inf
        self.fired[slot] = False
        self.thresholds[slot] = thresholds
        self.next_position[slot] = self.scored[slot] = self.sink[slot] = 0
        self.num_prompt[slot] = num_prompt
        for group in self.groups:
            group.reset(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def _grow(self, num_slots: int) -> None:
        old = len(self.next_position)
        extra, width = num_slots - old, self.statistics.shape[1]
        self.statistics = np.concatenate([self.statistics, np.full((extra, width), -np.inf)])
        self.fired = np.concatenate([self.fired, np.zeros((extra, width), dtype=bool)])
        self.thresholds = np.concatenate([self.thresholds, np.full((extra, width), np.nan)])
        none = np.zeros(extra, dtype=np.int64)
        self.next_position = np.concatenate([self.next_position, none])
        self.scored = np.concatenate([self.scored, none])
        self.sink = np.concatenate([self.sink, none])
        self.num_prompt = np.concatenate([self.num_prompt, none])
        for group in self.groups:
            group.grow(num_slots)
        self._free.extend(range(num_slots - 1, old - 1, -1))
