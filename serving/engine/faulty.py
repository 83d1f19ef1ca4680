"""Which requests of a step make the monitor fail, so that the others of the same step are judged as always."""

from __future__ import annotations

from collections.abc import Collection

import structlog

from monitor.generations import part_of
from monitor.monitor import StepReadouts
from probes.bank import Bank

log = structlog.get_logger(__name__)


def faulty_requests(step: StepReadouts, bank: Bank) -> frozenset[str]:
    """Requests whose rows cannot be scored, found by scoring each alone. Scoring changes no state."""
    found = set()
    for request_id, start, count in zip(step.request_ids, step.starts, step.counts, strict=True):
        try:
            bank.score(step.readouts[int(start) : int(start + count)])
        # Scorers are anybody's code. Whatever they raise is logged, and becomes a gap that the policy decides on.
        except Exception:
            log.exception("a request cannot be scored; it follows on_gap", id=request_id)
            found.add(request_id)
    return frozenset(found)


def without(step: StepReadouts, request_ids: Collection[str]) -> StepReadouts:
    """The step without some of its requests."""
    return part_of(step, [request_id for request_id in step.request_ids if request_id not in request_ids])
