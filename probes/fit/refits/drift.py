"""Repeats the fit of a drift detector."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np

from probes.artifact import Artifact
from probes.fit.fitters import Fitter, parse_fitter
from probes.fit.reading.token_rows import TokenRows
from probes.fit.refits.base import KindFit, RefitError, Tensors, fitter_config
from probes.fit.training.drift import DriftError, fit_drift
from probes.fit.training.linear_probe import Labels


class Drift(KindFit):
    """The direction of what changes from the row before the text that is read to its last.

    Args:
        fitter: of the direction.
    """

    kind = "drift"

    def __init__(self, fitter: Fitter) -> None:
        self._fitter = fitter

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """See ``KindFit.of``."""
        config = fitter_config(artifact.card)
        if config is None:
            raise RefitError("the card names no fitter")
        return cls(parse_fitter(config))

    def fit(self, rows: TokenRows, labels: Labels, *, other_model: Path | None) -> Tensors:
        """See ``KindFit.fit``. Rows without such a text, or without anything before it, show no change: left out."""
        lengths = [(len(part), before) for part, before in zip(rows.rows, rows.before, strict=True)]
        shown = [number for number, (length, before) in enumerate(lengths) if length > before > 0]
        if not 0 < labels[shown].sum() < len(shown):
            raise DriftError(
                f"{len(shown)} of {len(rows)} rows have a text that is read and a row before it, "
                f"{int(labels[shown].sum())} of them labelled 1; both labels are needed. Give conversations that have "
                "what the card's 'segments' name."
            )
        before, after = (np.stack([rows.rows[i][place] for i in shown]) for place in (0, -1))
        return fit_drift(before, after, labels[shown], fitter=self._fitter)

    def __str__(self) -> str:
        return f"{self._fitter} on what changes, as on the card"
