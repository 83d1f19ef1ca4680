"""The score of the newest token."""

from __future__ import annotations

from probes.aggregate.base import Aggregator, Scores


class Last(Aggregator):
    """The newest score: for a prompt, that of its last token."""

    kind = "last"

    @property
    def state_size(self) -> int:
        """One value: the newest score."""
        return 1

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        state[:, 0] = values[-1]
        return values
