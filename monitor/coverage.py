"""The account of a request's positions: scored, rightly skipped, or a gap. Plain numbers; decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from monitor.types import Gap, Skip


@dataclass(frozen=True, slots=True)
class Coverage:
    """Positions of one request. ``scored + sink + final + sum(gaps)`` is the number of its positions.

    Attributes:
        scored: went into every detector that the policy reads.
        sink: leading positions that a card excludes.
        final: 1 if the last sampled token was never fed back, so that the model never computed it.
        gaps: not scored although they should have been, by reason.
    """

    scored: int
    sink: int
    final: int
    gaps: Mapping[Gap, int]

    @property
    def positions(self) -> int:
        """All positions of the request."""
        return self.scored + self.sink + self.final + sum(self.gaps.values())

    def skipped(self) -> dict[str, int]:
        """Positions that were not scored, by reason; reasons that did not occur are left out."""
        counts = {Skip.SINK.value: self.sink, Skip.FINAL.value: self.final}
        counts.update({gap.value: number for gap, number in self.gaps.items()})
        return {reason: number for reason, number in counts.items() if number}


def close_account(
    *, next_position: int, scored: int, sink: int, gaps: Mapping[Gap, int], num_positions: int, sampled: int
) -> Coverage:
    """The account of a request that has ended with ``num_positions`` tokens, ``sampled`` of them generated.

    The last sampled token is never fed back; any other position that was not accounted for is a gap.
    """
    final = 1 if sampled > 0 and next_position < num_positions else 0
    missing = num_positions - final - next_position
    closed = dict(gaps)
    if missing > 0:
        closed[Gap.UNSEEN] = closed.get(Gap.UNSEEN, 0) + missing
    return Coverage(scored=scored, sink=sink, final=final, gaps=closed)
