"""Checks that can be fed together, and the aggregate states that they keep of each live request. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitor.check import Check
from monitor.request import Float64, Index, Request
from monitor.segments import Codes, role_mask
from monitor.types import Role
from monitor.weighed import WeighedCheck
from probes.aggregate import Aggregator
from probes.bank import Bank
from probes.card import Stage


@dataclass(frozen=True, slots=True)
class Reading:
    """What checks must share to be fed together."""

    stage: Stage
    aggregate: Aggregator
    skip_first: int
    segments: tuple[Role, ...] | None


class WatchGroup:
    """Checks that share stage, aggregate, skipped positions and segments: one array operation feeds them all.

    Attributes:
        checks: their positions in the plan.
        sources: (checks * C,), where what its aggregate takes stands in the bank's scores: C channels for each check.
        columns: where they stand in the arrays of the ``StateTable``, side by side.
        state: (slots, S, checks). Slots lie side by side in memory where that changes no sum: a step feeds many
            requests and few checks.
    """

    def __init__(self, reading: Reading, checks: Index, sources: Index, columns: slice) -> None:
        self.stage = reading.stage
        self.columns = columns
        self.aggregate = aggregate = reading.aggregate
        self.skip_first = reading.skip_first
        self.has_segments = reading.segments is not None
        self._mask = role_mask(reading.segments or ())
        self.checks = checks
        self.sources = sources
        # With several channels or one check, numpy might add what belongs to one request in another order for one
        # request than for many, and no request may change another's last bit.
        self._slots_lie_together = aggregate.channels == 1 and len(checks) > 1
        self.state = aggregate.new_state(0, len(checks))

    def reads(self, request: Request, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which positions of a request these checks read: (n,) in, (n,) out."""
        if self.stage is not Stage.PROMPT:
            return positions >= max(request.stream_from - self.aggregate.reads_before, self.skip_first)
        read = (positions < request.num_prompt) & (positions >= self.skip_first)
        if self.has_segments and request.roles is not None:
            read[read] = self._mask[request.roles[positions[read]]]
            if self.aggregate.reads_before:
                read |= positions == self._before(request.roles)
        return read

    def _before(self, roles: Codes) -> int:
        """Position of the row before the first that is read by its role; -1 where there is none to read."""
        wanted = np.flatnonzero(self._mask[roles[self.skip_first :]])
        return int(wanted[0]) + self.skip_first - 1 if len(wanted) and wanted[0] > 0 else -1

    def grow(self, num_slots: int) -> None:
        """Make room; states of live requests stay as they are."""
        old = len(self.state)
        fresh = self.aggregate.new_state(num_slots, len(self.checks))
        if self._slots_lie_together:
            fresh = np.moveaxis(np.ascontiguousarray(np.moveaxis(fresh, 0, -1)), -1, 0)
        fresh[:old] = self.state
        self.state = fresh

    def reset(self, slot: int) -> None:
        """Fresh state for a slot."""
        self.state[slot] = self.aggregate.initial

    def feed(self, slot: int, scores: Float64) -> Float64:
        """Feed T rows of one request.

        Args:
            slot: its row in the arrays.
            scores: (T, width of the bank's scores).
        Returns: (T, checks of this group), the running statistic.
        """
        values = np.ascontiguousarray(scores[:, self.sources])
        return self.aggregate.update(self.state[slot : slot + 1], values[:, None])[:, 0]

    def feed_some(self, slots: Index, scores: Float64) -> Float64:
        """Feed one row to each of R requests.

        Args:
            slots: (R,).
            scores: (R, checks * C) of this group's sources.
        Returns: (R, checks of this group), the running statistic.
        """
        state = self.state[slots]
        running: Float64 = self.aggregate.update(state, self._laid(scores)[None])[0]
        self.state[slots] = state
        return running

    def feed_range(self, first: int, scores: Float64, holes: Index) -> Float64:
        """Feed one row to each of the slots from ``first`` on, in place, those at ``holes`` excepted.

        Args:
            first: slot of the first row.
            scores: (n, checks * C) of this group's sources; rows at ``holes`` mean nothing.
            holes: rows to leave alone.
        Returns: (n, checks of this group), the running statistic.
        """
        state = self.state[first : first + len(scores)]
        kept = state[holes] if len(holes) else None
        running: Float64 = self.aggregate.update(state, self._laid(scores)[None])[0]
        if kept is not None:
            state[holes] = kept
        return running

    def _laid(self, scores: Float64) -> Float64:
        """Scores of a step as the state lies."""
        return scores if self._slots_lie_together else np.ascontiguousarray(scores)


def group_checks(checks: Sequence[Check | WeighedCheck], bank: Bank) -> tuple[WatchGroup, ...]:
    """The fewest groups that cover all checks which are fed: weighted sums rest on others."""
    members: dict[Reading, list[int]] = {}
    for position, check in enumerate(checks):
        if isinstance(check, WeighedCheck):
            continue
        reading = Reading(check.stage, check.aggregate, check.skip_first, check.segments)
        members.setdefault(reading, []).append(position)
    groups = []
    first = 0
    # Those that every generated token feeds stand side by side, before those of prompts.
    for reading, positions in sorted(members.items(), key=lambda item: item[0].stage is Stage.PROMPT):
        groups.append(
            WatchGroup(
                reading,
                np.array(positions, dtype=np.intp),
                _sources([checks[position].detector for position in positions], reading.aggregate, bank),
                slice(first, first + len(positions)),
            )
        )
        first += len(positions)
    return tuple(groups)


def _sources(detectors: Sequence[str], aggregate: Aggregator, bank: Bank) -> Index:
    channels = np.arange(aggregate.channels, dtype=np.intp)
    return np.concatenate([bank.index[name] + channels for name in detectors]).astype(np.intp)
