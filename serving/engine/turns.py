"""Requests of conversations under way: their choices are joined, and their sessions hear of them once they end."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from serving.engine.records import Record
from serving.sitting import Reading, Sitting

_CHILD = re.compile(r"^\d+_(?P<parent>.+)$")
_MOST = 65_536


@dataclass(slots=True)
class _Turn:
    sitting: Sitting
    choices: int
    ended: dict[str, Record] = field(default_factory=dict)

    def reading(self, request_id: str) -> Reading | None:
        """What all choices together were like; None if nothing was read of any."""
        records = [record for record in self.ended.values() if record.statistics]
        if not records:
            return None
        # Many choices are one request: asking for many must not count more often, and the worst of them counts.
        largest = np.max([np.nan_to_num(record.statistics, nan=-np.inf) for record in records], axis=0)
        first = records[0]
        return Reading(request_id, first.plan, first.policy, first.fmt, largest.tolist())


class Turns:
    """The requests of sessions that one API process waits for, by the engine's own ids."""

    def __init__(self) -> None:
        self._turns: OrderedDict[str, _Turn] = OrderedDict()

    def __len__(self) -> int:
        return len(self._turns)

    def begin(self, request_id: str, choices: int, sitting: Sitting) -> None:
        """A request is about to be sent to the engine.

        Args:
            request_id: of all its choices together.
            choices: that it asks for.
            sitting: its part in its session.
        """
        self._turns[request_id] = _Turn(sitting, choices)
        if len(self._turns) > _MOST:  # whatever an engine never said a word of
            self._turns.popitem(last=False)

    def ended(self, request_id: str, record: Record) -> None:
        """A choice has ended, and nothing more will be read of it. Whoever says so again changes nothing."""
        if request_id not in self._turns and (child := _CHILD.match(request_id)) is not None:
            name = child["parent"]
        else:
            name = request_id
        turn = self._turns.get(name)
        if turn is None:
            return
        turn.ended.setdefault(request_id, record)
        if len(turn.ended) < turn.choices:
            return
        del self._turns[name]
        reading = turn.reading(name)
        if reading is not None:
            turn.sitting.take(reading)

    def left(self, records: Mapping[str, Record]) -> None:
        """The engine will say nothing more of these; vLLM has made no last output for some of them."""
        if self._turns:
            for request_id, record in records.items():
                self.ended(request_id, record)
