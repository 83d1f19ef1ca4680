"""The rows of an evaluation, and how they are kept apart from those that the detector was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from probes.errors import TelltaleError
from probes.fit.evaluation.evaluation import DataRef, Split, SplitPolicy
from probes.fit.rows.dataset import count_sources
from probes.fit.rows.example import Example, data_digest

__all__ = ["EvaluationError", "Rows", "data_ref"]


class EvaluationError(TelltaleError, ValueError):
    """A detector cannot be evaluated on these rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What is given to measure on.

    Attributes:
        measured: both labels.
        file: where they come from, for the report.
        train: what the detector was fitted on; None: not given.
        train_file: where these come from; rows without a source of their own have a file's name as theirs.
    """

    measured: Sequence[Example]
    file: str
    train: Sequence[Example] | None = None
    train_file: str = ""

    def apart(self) -> tuple[list[Example], Split]:
        """What may be measured: rows whose text or group stands in the training rows are left out.

        Raises:
            EvaluationError: a label is missing in what is left, or in the training rows.
        """
        train = self.train or ()
        texts, groups = {row.digest for row in train}, {row.group for row in train}
        kept = [row for row in self.measured if row.digest not in texts and row.group not in groups]
        removed = len(self.measured) - len(kept)
        left = f"are left, after {removed} whose text or group stands in the training rows too were taken out"
        _require_both(kept, f"{self.file}: ", left if removed else "are there")
        if self.train is None:
            return kept, Split(policy=SplitPolicy.UNCHECKED, removed=removed)
        _require_both(train, f"{self.train_file}: ", "are there")
        sources, known = {row.source for row in kept}, {row.source for row in train}
        # A file's name says nothing of where its rows come from.
        unseen = not sources & known and self.file not in sources and self.train_file not in known
        policy = SplitPolicy.HELD_OUT_SOURCES if unseen else SplitPolicy.GROUPED
        return kept, Split(policy=policy, removed=removed)


def data_ref(file: str, rows: Sequence[Example]) -> DataRef:
    """What a report says of some rows."""
    return DataRef(file=file, digest=data_digest(rows), rows=len(rows), sources=count_sources(rows))


def _require_both(rows: Sequence[Example], where: str, state: str) -> None:
    positives = sum(row.label for row in rows)
    if not 0 < positives < len(rows):
        raise EvaluationError(
            f"{where}{positives} positive and {len(rows) - positives} negative rows {state}. Both labels are needed: "
            "add rows of the missing one."
        )
