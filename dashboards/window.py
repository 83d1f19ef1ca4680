"""Durations in rules. One factor shortens all of them, so that a rehearsal of an hour's alert takes a minute."""

from __future__ import annotations

from dataclasses import dataclass

SECOND = 1
MINUTE = 60
HOUR = 3600
DAY = 86400


@dataclass(frozen=True, slots=True)
class Clock:
    """Writes durations as PromQL does.

    Attributes:
        factor: every duration is multiplied with it; 1 in the rules that are shipped.
    """

    factor: float = 1.0

    def __call__(self, seconds: int) -> str:
        """A duration in the greatest unit that keeps it whole; a shortened one is at least a second.

        Args:
            seconds: at least 0.
        """
        scaled = round(seconds * self.factor)
        if seconds and not scaled:
            scaled = 1
        for unit, size in (("d", DAY), ("h", HOUR), ("m", MINUTE)):
            if scaled and scaled % size == 0:
                return f"{scaled // size}{unit}"
        return f"{scaled}s"

    def seconds(self, seconds: int) -> float:
        """The same duration as a number, for comparisons with time stamps."""
        return seconds * self.factor
