"""What is kept of all live requests, in arrays: aggregate states, statistics, limits. Decides nothing."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from monitor.groups import WatchGroup
from monitor.request import Float64, Index
from monitor.weighed import FORMATS, Sums, WeighedCheck
from probes.card import Format, Stage

Number = TypeVar("Number", np.float64, np.bool_)

_DENSE = 2
"""A step's requests are fed in place if their slots span at most so many times their number."""


class StateTable:
    """Slots for live requests: the lowest free one is handed out, so that those in use lie close together.

    Columns are the checks of the plan, those of one group side by side and weighted sums behind them: ``order`` says
    which check a column is. In memory a column's slots lie side by side: a step touches many slots, and the checks of
    a group are few.

    Args:
        groups: of the checks that are fed.
        weighed: weighted sums of them, by their positions in the plan.
        initial_slots: room at the start; more is made when it is needed.

    Attributes:
        order: (checks,), the position in the plan of each column.
        column_of: of each position in the plan.
        statistics: (slots, checks), the statistic that is judged: at prompt the value after the last prompt token,
            at stream the maximum so far, at response the value at the newest token; ``-inf`` while undefined.
        fired: (slots, checks).
        next_position: (slots,), the first position that is not accounted for; each position counts once.
        scored, sink: (slots,), positions so far.
        num_prompt: (slots,), prompt tokens.
        prompt_judged: (slots,), whether it has been noted that the prompt is through.
        formats: (slots,), numbers of the requests' formats.
        limits: (slots, checks), above which a check fires. NaN where nothing can: in free slots, where the format is
            not calibrated, after it has fired, and at the stage response, which is judged at the end.
        limits_at_end: (slots, checks), above which a check at the stage response fires if the reply ends; else NaN.
        end_limits_hold_to: (slots,), the last ``next_position`` for which ``limits_at_end`` are right: some depend on
            the length of what was read.
    """

    def __init__(
        self,
        groups: Sequence[WatchGroup],
        weighed: Mapping[int, WeighedCheck] = MappingProxyType({}),
        *,
        initial_slots: int = 64,
    ) -> None:
        self.groups = tuple(groups)
        sums = np.array(list(weighed), dtype=np.intp)
        self.order: Index = np.concatenate([*(group.checks for group in groups), sums]).astype(np.intp)
        self._places: Index = np.argsort(self.order)
        self.column_of: Mapping[int, int] = {check: column for column, check in enumerate(self.order.tolist())}
        self._sums = [
            (np.array([self.column_of[number] for number in numbers]), self._sums_of([weighed[n] for n in numbers]))
            for scaled in (False, True)
            if (numbers := [n for n, check in weighed.items() if (check.terms[0].scaling is not None) is scaled])
        ]
        # Prompt groups come last: what each generated token feeds is one run of columns.
        self._running = [group for group in groups if group.stage is not Stage.PROMPT]
        self._sources: Index = np.concatenate([np.empty(0, dtype=np.intp), *(group.sources for group in self._running)])
        ends = np.cumsum([len(group.sources) for group in self._running], dtype=np.intp).tolist()
        self._within = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        width = len(self.order)
        self.statistics = np.empty((0, width))
        self.fired = np.empty((0, width), dtype=bool)
        self.limits = np.empty((0, width))
        self.limits_at_end = np.empty((0, width))
        self.end_limits_hold_to = np.empty(0, dtype=np.int64)
        self.next_position = np.empty(0, dtype=np.int64)
        self.scored = np.empty(0, dtype=np.int64)
        self.sink = np.empty(0, dtype=np.int64)
        self.num_prompt = np.empty(0, dtype=np.int64)
        self.prompt_judged = np.empty(0, dtype=bool)
        self.formats: Index = np.empty(0, dtype=np.intp)
        self._free: list[int] = []
        self._grow(initial_slots)

    def take(self, limits: Float64, limits_at_end: Float64, num_prompt: int, fmt: Format) -> int:
        """A fresh slot.

        Args:
            limits: (checks,), while the request runs.
            limits_at_end: (checks,), when its reply has ended; right at any length until told otherwise.
            num_prompt: its prompt tokens.
            fmt: its format.
        """
        if not self._free:
            self._grow(2 * len(self.next_position))
        slot = heapq.heappop(self._free)
        self.statistics[slot] = -np.inf
        self.fired[slot] = False
        self.limits[slot] = limits
        self.limits_at_end[slot] = limits_at_end
        self.end_limits_hold_to[slot] = np.iinfo(np.int64).max
        self.next_position[slot] = self.scored[slot] = self.sink[slot] = 0
        self.num_prompt[slot] = num_prompt
        self.prompt_judged[slot] = False
        self.formats[slot] = FORMATS.index(fmt)
        for group in self.groups:
            group.reset(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self.limits[slot] = np.nan
        heapq.heappush(self._free, slot)

    def in_plan_order(self, columns: npt.NDArray[Number]) -> npt.NDArray[Number]:
        """(..., checks) as they stand here, in the order of the plan."""
        return columns.T.take(self._places, axis=0).T

    def of(self, values: npt.NDArray[Number], slots: Index) -> npt.NDArray[Number]:
        """Rows of one of these arrays, in the order of ``slots``; a view where they are one run of slots."""
        first = int(slots[0])
        if int(slots[-1]) + 1 - first == len(slots) and bool((slots[1:] > slots[:-1]).all()):
            return values[first : first + len(slots)]
        return values.T.take(slots, axis=1).T

    def weigh(self, slots: Index) -> None:
        """Bring the weighted sums of some requests up to date."""
        if not self._sums:
            return
        first, last = int(slots.min()), int(slots.max())
        # What lies between them comes out as it was: a sum hangs on nothing but its own request's statistics.
        dense = last + 1 - first <= _DENSE * len(slots)
        rows: slice | Index = slice(first, last + 1) if dense else slots
        statistics, formats = self.statistics[rows], self.formats[rows]
        for columns, sums in self._sums:
            values = sums.values(statistics, formats)
            if dense:
                statistics[:, columns] = values
            else:
                self.statistics[slots[:, None], columns] = values

    def _sums_of(self, checks: Sequence[WeighedCheck]) -> Sums:
        return Sums(checks, [[self.column_of[term.check] for term in check.terms] for check in checks])

    def feed_chunk(self, slot: int, group: WatchGroup, scores: Float64) -> None:
        """Feed the rows of one request that a group reads.

        Args:
            slot: of the request.
            group: one of ``groups``.
            scores: (T, width of the bank's scores), T at least 1.
        """
        running = group.feed(slot, scores)
        newest = running[-1]
        if group.stage is Stage.STREAM:
            newest = np.maximum(self.statistics[slot, group.columns], running.max(axis=0))
        self.statistics[slot, group.columns] = newest

    def feed_tokens(self, slots: Index, scores: Float64) -> None:
        """Feed one generated token of each of R requests, and account for it.

        Args:
            slots: (R,), all different.
            scores: (R, width of the bank's scores).
        """
        first, last = int(slots.min()), int(slots.max())
        span = last + 1 - first
        if span > _DENSE * len(slots):
            self._feed_scattered(slots, self._picked(scores))
        elif span == len(slots) and bool((slots[1:] > slots[:-1]).all()):
            self.next_position[first : last + 1] += 1
            self.scored[first : last + 1] += 1
            self._feed_range(first, self._picked(scores), slots[:0])
        else:
            # Over the whole range of slots as well: what lies between them is put back afterwards.
            self.next_position[slots] += 1
            self.scored[slots] += 1
            rows = slots - first
            mask = np.ones(span, dtype=bool)
            mask[rows] = False
            spread = np.zeros((len(self._sources), span)).T
            spread[rows] = self._picked(scores)
            self._feed_range(first, spread, np.flatnonzero(mask))

    def _picked(self, scores: Float64) -> Float64:
        """(R, running checks * C), what the running groups take of scores, column by column."""
        return scores.T.take(self._sources, axis=0).T

    def _feed_scattered(self, slots: Index, scores: Float64) -> None:
        self.next_position[slots] += 1
        self.scored[slots] += 1
        for group, within in zip(self._running, self._within, strict=True):
            place = np.ix_(slots, np.arange(group.columns.start, group.columns.stop))
            running = group.feed_some(slots, scores[:, within])
            best = self.statistics[place] if group.stage is Stage.STREAM else -np.inf
            self.statistics[place] = np.maximum(best, running)

    def _feed_range(self, first: int, scores: Float64, holes: Index) -> None:
        """Feed the slots from ``first`` on in place; what ``scores`` has for ``holes`` leaves no trace."""
        statistics = self.statistics[first : first + len(scores)]
        kept = statistics[holes] if len(holes) else None
        for group, within in zip(self._running, self._within, strict=True):
            running = group.feed_range(first, scores[:, within], holes)
            columns = statistics[:, group.columns]
            if group.stage is Stage.STREAM:
                np.maximum(columns, running, out=columns)
            else:
                columns[:] = running
        if kept is not None:
            statistics[holes] = kept

    def above(self, slots: Index) -> list[tuple[int, int]]:
        """Pairs (place in ``slots``, column) where a statistic lies above its limit.

        NaN limits and undefined statistics (-inf) compare as false.
        """
        first, last = int(slots.min()), int(slots.max())
        if last + 1 - first > _DENSE * len(slots):
            found = self.statistics[slots] > self.limits[slots]
        else:
            span = slice(first, last + 1)
            found = self.statistics[span] > self.limits[span]
            if not found.any():
                return []
            found = found[slots - first]
        return [(int(place), int(column)) for place, column in zip(*np.nonzero(found), strict=True)]

    def _grow(self, num_slots: int) -> None:
        old = len(self.next_position)
        extra, width = num_slots - old, self.statistics.shape[1]
        self.statistics = np.concatenate([self.statistics.T, np.full((width, extra), -np.inf)], axis=1).T
        self.fired = np.concatenate([self.fired.T, np.zeros((width, extra), dtype=bool)], axis=1).T
        self.limits = np.concatenate([self.limits.T, np.full((width, extra), np.nan)], axis=1).T
        self.limits_at_end = np.concatenate([self.limits_at_end.T, np.full((width, extra), np.nan)], axis=1).T
        none = np.zeros(extra, dtype=np.int64)
        self.next_position = np.concatenate([self.next_position, none])
        self.scored = np.concatenate([self.scored, none])
        self.sink = np.concatenate([self.sink, none])
        self.num_prompt = np.concatenate([self.num_prompt, none])
        self.end_limits_hold_to = np.concatenate([self.end_limits_hold_to, none])
        self.prompt_judged = np.concatenate([self.prompt_judged, none.astype(bool)])
        self.formats = np.concatenate([self.formats, none.astype(np.intp)])
        for group in self.groups:
            group.grow(num_slots)
        for slot in range(old, num_slots):
            heapq.heappush(self._free, slot)
