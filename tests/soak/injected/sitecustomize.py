"""Runs at the start of every process of a server under test, and writes down what its monitors read.

``TELLTALE_TEST_RECORD`` names the folder: one file of JSON lines for each process, a line for each request that has
ended; and for each plan, which column of a row is whose. Nothing of the product knows of this.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("TELLTALE_TEST_RECORD")
POLL_SECONDS = 0.02


def module(name: str, attribute: str) -> Any:
    """A module that some other thread imports, once it is whole."""
    while not hasattr(sys.modules.get(name), attribute):
        time.sleep(POLL_SECONDS)
    return sys.modules[name]


class Recording:
    """Listens at all monitors of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = (folder / f"{os.getpid()}.jsonl").open("a", buffering=1)
        self.live: dict[str, tuple[Any, dict[int, Any]]] = {}
        self.plans: set[str] = set()

    def admitted(self, monitor: Any, request: Any) -> None:
        """A request begins."""
        plan = monitor.plan
        if plan.digest not in self.plans:
            self.plans.add(plan.digest)
            bank = plan.bank
            columns = {
                name: {str(tap): found.tolist() for tap, found in bank._given(bank.detector(name)).items()}
                for name in bank.index
            }
            (self.folder / f"{plan.digest}.json").write_text(json.dumps(columns))
        self.live[request.request_id] = (request, {})

    def take(self, name: str, positions: Any, rows: Any) -> None:
        """Rows of a request: the first of each position counts."""
        found = self.live.get(name)
        if found is not None:
            for position, row in zip(positions, rows, strict=True):
                found[1].setdefault(int(position), row.copy())

    def ended(self, monitor: Any, name: str) -> None:
        """It has ended."""
        found = self.live.pop(name, None)
        if found is None:
            return
        request, rows = found
        import numpy as np

        order = sorted(rows)
        stacked = np.array([rows[position] for position in order], dtype=np.float32)
        line = {
            "request": name,
            "plan": monitor.plan.digest,
            "policy": monitor.plan.policies[request.policy].name,
            "format": request.fmt.value,
            "num_prompt": request.num_prompt,
            "stream_from": request.stream_from,
            "positions": order,
            "width": stacked.shape[1] if order else 0,
            "rows": base64.b64encode(stacked.tobytes()).decode(),
        }
        self.file.write(json.dumps(line) + "\n")


def record(folder: Path) -> None:
    monitor_class = module("monitor.monitor", "Monitor").Monitor
    recording = Recording(folder)
    admit, observe, replay, finish = (getattr(monitor_class, name) for name in ("admit", "observe", "replay", "finish"))

    def admit_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = admit(self, *args, **kwargs)
        recording.admitted(self, request)
        return request

    def observe_and_tell(self: Any, step: Any) -> Any:
        for name, start, count in zip(step.request_ids, step.starts, step.counts, strict=True):
            recording.take(name, step.positions[start : start + count], step.readouts[start : start + count])
        return observe(self, step)

    def replay_and_tell(self: Any, name: str, readouts: Any) -> Any:
        recording.take(name, range(len(readouts)), readouts)
        return replay(self, name, readouts)

    def finish_and_tell(self: Any, name: str, **settings: Any) -> Any:
        ended = finish(self, name, **settings)
        recording.ended(self, name)
        return ended

    monitor_class.admit, monitor_class.observe = admit_and_tell, observe_and_tell
    monitor_class.replay, monitor_class.finish = replay_and_tell, finish_and_tell


if FOLDER:
    threading.Thread(target=record, args=(Path(FOLDER),), daemon=True).start()
