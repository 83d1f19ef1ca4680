"""What a worker sends to the scheduler with a step's result: readouts and absolute positions, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serving.engine.pick_order import PickedRows

ATTRIBUTE = "telltale"
"""Name of the extra attribute on vLLM's ``ModelRunnerOutput``."""


@dataclass(frozen=True, slots=True)
class WorkerReadouts:
    """The rows of one step, in the order of the worker's batch.

    Attributes:
        request_ids: one entry per request.
        counts: (R,) int64, rows of each.
        positions: (n,) int64, absolute token positions.
        readouts: (n, width of the bank) float32.
        doses: (n, steers) float32, how far each steer moved a row; None in a step in which nothing was steered.
        picked: whole rows that were asked for; None in a step in which none were.
        seconds: that it took to get them out of the worker's buffers, beside what vLLM does anyway.
        tap_seconds: that the taps took in the pass itself; None where nobody can tell.
    """

    request_ids: list[str]
    counts: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    readouts: npt.NDArray[np.float32]
    doses: npt.NDArray[np.float32] | None = None
    picked: PickedRows | None = None
    seconds: float = 0.0
    tap_seconds: float | None = None
