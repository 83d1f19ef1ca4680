"""What the scheduler tells the workers of one step: of which of its requests which whole rows are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PICKS = "telltale_picks"
"""Name of the extra attribute on vLLM's ``SchedulerOutput``."""
MAX_PICKS = 64
"""Rows of one step, at most."""

Wanted = tuple[tuple[str, int], ...]
"""Request and absolute position of each row."""
PickOrders = Mapping[str, Sequence[int]]
"""Absolute positions by request; at most ``MAX_PICKS`` in all."""


@dataclass(frozen=True, slots=True)
class PickedRows:
    """What came of the orders of one step.

    Attributes:
        wanted: of each row.
        rows: (len(wanted), d_model) float32; NaN where the position was not in this step, or the layer did not run.
    """

    wanted: Wanted
    rows: npt.NDArray[np.float32]
