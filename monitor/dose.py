"""What steers did to one request: how many of its rows they wrote to, and how far. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)
class Dose:
    """Of one steer, in units of the stream's median norm.

    Attributes:
        tokens: rows that were changed.
        total: of their changes' sizes.
        largest: of them.
    """

    tokens: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, sizes: npt.NDArray[np.float64]) -> None:
        """Count rows: (n,) sizes, 0 where nothing was changed."""
        changed = sizes[sizes > 0]
        if len(changed):
            self.tokens += len(changed)
            self.total += float(changed.sum())
            self.largest = max(self.largest, float(changed.max()))

    @property
    def mean(self) -> float:
        """Over the rows that were changed; 0 if there are none."""
        return self.total / self.tokens if self.tokens else 0.0
