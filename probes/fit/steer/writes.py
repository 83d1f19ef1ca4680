"""What an evaluation writes to rows: one steer, or several that are written together. Types alone."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from probes.steering.base import Float64
from probes.taps import Tap

__all__ = ["RowUpdate", "Writes"]


class RowUpdate(Protocol):
    """A change of rows."""

    @property
    def d_model(self) -> int:
        """Width of the rows."""
        ...

    def apply(self, stream: Float64, where: npt.NDArray[np.bool_]) -> tuple[Float64, Float64]:
        """See ``probes.steering.Update.apply``."""
        ...


class Writes(Protocol):
    """What is written after one layer. ``probes.steering.steer.Steer`` is one."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def tap(self) -> Tap:
        """After which layer."""
        ...

    @property
    def update(self) -> RowUpdate:
        """Of a row."""
        ...

    @property
    def unit(self) -> float:
        """The stream's median norm."""
        ...

    @property
    def strength(self) -> float | None:
        """By which conditions are told apart."""
        ...

    def span(self, num_prompt: int) -> tuple[int, int]:
        """See ``probes.steering.steer.Steer.span``."""
        ...
