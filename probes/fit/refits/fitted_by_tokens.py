"""Repeats the fit of a kind that a token fitter makes: attention, multimax, mlp, and those of other distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from probes.aggregate import Aggregator
from probes.artifact import Artifact
from probes.fit.reading.token_rows import TokenRows
from probes.fit.refits.base import KindFit, RefitError, Tensors, fitter_config
from probes.fit.token_fitters import TokenFitter, parse_token_fitter, token_fitter_kinds
from probes.fit.training.linear_probe import Labels


class FittedByTokens(KindFit):
    """The token fitter on the card, on the rows given.

    Args:
        fitter: with its parameters.
    """

    def __init__(self, fitter: TokenFitter) -> None:
        self._fitter = fitter

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """See ``KindFit.of``."""
        config, kind = fitter_config(artifact.card), artifact.card.kind
        known = {name for name, fitter in token_fitter_kinds().items() if fitter.makes == kind}
        if not isinstance(config, dict) or config.get("kind") not in known:
            raise RefitError(f"the card names no fitter that makes it (known: {', '.join(sorted(known)) or 'none'})")
        return cls(parse_token_fitter(config))

    @property
    def aggregate(self) -> Aggregator:
        """The fitter's own."""
        return self._fitter.aggregate

    def fit(self, rows: TokenRows, labels: Labels, *, other_model: Path | None) -> Tensors:
        """See ``KindFit.fit``."""
        return self._fitter.fit(rows.sequences(), labels).tensors()

    def __str__(self) -> str:
        return f"{self._fitter}, as on the card"
