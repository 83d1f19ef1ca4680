"""Keep every row that the monitor of an in-process engine takes in, and the account of every request that ends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np


class Recorder:
    """Listens at a scheduler's monitor.

    Attributes:
        rows: per request, (position, readouts) in the order in which the monitor took them in.
        replayed: per request, rows that came out of the readout store.
        ended: per request, its account and statistics.
        events: what the engine did: preemptions, steps, rejected and accepted draft rows.
    """

    def __init__(self, scheduler: Any) -> None:
        monitor = scheduler._monitor
        self.monitor = monitor
        self.rows: dict[str, list[tuple[int, np.ndarray]]] = {}
        self.replayed: Counter[str] = Counter()
        self.ended: dict[str, Any] = {}
        self.events: Counter[str] = Counter()
        observe, replay, finish = monitor.observe, monitor.replay, monitor.finish
        preempt, update = scheduler._preempt_request, scheduler.update_from_output

        def keep(step: Any) -> None:
            self.events["steps"] += 1
            for name, start, count in zip(step.request_ids, step.starts, step.counts, strict=True):
                for row in range(start, start + count):
                    self._keep(name, int(step.positions[row]), step.readouts[row])
            observe(step)

        def keep_replay(name: str, readouts: np.ndarray) -> None:
            for position, row in enumerate(readouts):
                self._keep(name, position, row)
            self.replayed[name] += len(readouts)
            replay(name, readouts)

        def keep_end(name: str, **settings: Any) -> Any:
            ended = finish(name, **settings)
            self.ended[name] = ended
            return ended

        def count_preemption(*args: Any, **kwargs: Any) -> Any:
            self.events["preemptions"] += 1
            return preempt(*args, **kwargs)

        def count_drafts(scheduled: Any, output: Any) -> Any:
            for name, drafts in scheduled.scheduled_spec_decode_tokens.items():
                sampled = output.sampled_token_ids[output.req_id_to_index[name]]
                if sampled:
                    self.events["accepted"] += len(sampled) - 1
                    self.events["rejected"] += len(drafts) - (len(sampled) - 1)
            return update(scheduled, output)

        monitor.observe, monitor.replay, monitor.finish = keep, keep_replay, keep_end
        scheduler._preempt_request, scheduler.update_from_output = count_preemption, count_drafts

    def _keep(self, name: str, position: int, row: np.ndarray) -> None:
        self.rows.setdefault(name, []).append((position, row.copy()))

    def summary(self, name: str) -> dict[str, Any]:
        """Of one request: its rows by position (the first of each counts), its account, what fired."""
        first: dict[int, np.ndarray] = {}
        for position, row in self.rows.get(name, []):
            first.setdefault(position, row)
        ended = self.ended[name]
        return {
            "positions": sorted(first),
            "readouts": [first[position].tolist() for position in sorted(first)],
            "repeated": len(self.rows.get(name, [])) - len(first),
            "replayed": self.replayed[name],
            "scored": ended.coverage.scored,
            "skipped": ended.coverage.skipped(),
            "total": ended.coverage.positions,
            "statistics": ended.statistics.tolist(),
            "action": ended.request.action.action.value,
        }
