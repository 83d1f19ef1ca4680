"""How long to wait before another attempt: exponential backoff with full jitter (Brooker, AWS, 2015)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between attempts.

    Attributes:
        first_seconds: upper end of the first pause; it doubles with every failure.
        longest_seconds: no pause is longer, whatever a receiver asks for.
        random: draws; receivers that come back are not met by all senders at once.
    """

    first_seconds: float = 0.5
    longest_seconds: float = 60.0
    random: random.Random = field(default_factory=random.SystemRandom)

    def pause(self, failures: int, asked_seconds: float = 0.0) -> float:
        """Seconds to wait.

        Args:
            failures: attempts that failed so far, at least 1.
            asked_seconds: what the receiver asked for; at least that long, up to the longest pause.
        """
        end = min(self.longest_seconds, self.first_seconds * 2.0 ** (failures - 1))
        return min(self.longest_seconds, max(asked_seconds, self.random.uniform(0.0, end)))
