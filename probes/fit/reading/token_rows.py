"""The activations of every token that is read of some requests, with the row before: what any kind can be fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.card import Stage
from probes.detectors import Detector
from probes.fit.reading.rendered import Rendered
from probes.fit.reading.scores import ActivationSource, statistic_of
from probes.fit.reading.sequences import Sequences
from probes.taps import Tap

__all__ = ["TokenRows"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Requests at one tap, in memory: 4 x d_model bytes for each token.

    Attributes:
        tap: where.
        rows: (before + T, d_model) float32 of each request; T may be 0.
        before: how many rows of each stand before the first that is read: 0 or 1.
    """

    tap: Tap
    rows: Sequence[npt.NDArray[np.float32]]
    before: Sequence[int]

    @classmethod
    def read(
        cls, requests: Sequence[Rendered], source: ActivationSource, *, tap: Tap, skip_first: int, label: str
    ) -> TokenRows:
        """Read requests.

        Args:
            requests: what to read.
            source: of their activations.
            tap: where.
            skip_first: leading positions that are never scored.
            label: what the requests are, for progress.
        """
        rows: list[npt.NDArray[np.float32]] = [np.empty((0, 0), dtype=np.float32)] * len(requests)
        before = [0] * len(requests)
        for number, found in source.sweep(requests, [tap], label=label):
            positions = requests[number].positions(skip_first)
            before[number] = int(len(positions) > 0 and positions[0] > skip_first)
            wanted = np.concatenate([positions[: before[number]] - 1, positions])
            rows[number] = found[tap][wanted]  # by number: a copy, so that the batch is let go
        return cls(tap, rows, before)

    def __len__(self) -> int:
        return len(self.rows)

    def some(self, index: Sequence[int]) -> TokenRows:
        """These requests, in this order; nothing is copied."""
        return TokenRows(self.tap, [self.rows[i] for i in index], [self.before[i] for i in index])

    def tokens(self) -> list[npt.NDArray[np.float32]]:
        """(T, d_model) of each request, without the row before."""
        return [rows[before:] for rows, before in zip(self.rows, self.before, strict=True)]

    def sequences(self) -> Sequences:
        """As a token fitter takes them; a request of which nothing is read has one row of zeros."""
        width = max(rows.shape[1] for rows in self.rows)
        nothing = np.zeros((1, width), dtype=np.float32)
        return Sequences.of(rows if len(rows) else nothing for rows in self.tokens())

    def statistics(self, detector: Detector, aggregate: Aggregator, stage: Stage) -> Float64:
        """(n,) what a detector at this tap would be judged by; minus infinity where that is not defined."""
        found = np.full(len(self), -np.inf)
        for number, (rows, before) in enumerate(zip(self.rows, self.before, strict=True)):
            if len(rows) > before:
                scores = detector.score(detector.read({self.tap: rows}))
                found[number] = statistic_of(aggregate, stage, scores[before:], before=scores[:before])
        return found
