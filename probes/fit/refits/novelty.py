"""Repeats the fit of a novelty detector: the rows labelled 0 are the ordinary ones."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np

from probes.artifact import Artifact
from probes.fit.reading.token_rows import TokenRows
from probes.fit.refits.base import KindFit, Tensors
from probes.fit.training.linear_probe import Labels
from probes.fit.training.novelty import fit_novelty


class Novelty(KindFit):
    """Principal components of the tokens of rows labelled 0.

    Args:
        components: how many, as many as the detector has.
    """

    kind = "novelty"

    def __init__(self, components: int) -> None:
        self._components = components

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """See ``KindFit.of``."""
        return cls(len(artifact.tensors["components"]))

    def fit(self, rows: TokenRows, labels: Labels, *, other_model: Path | None) -> Tensors:
        """See ``KindFit.fit``."""
        ordinary = rows.some(np.flatnonzero(labels == 0).tolist())
        tokens = np.concatenate([part for part in ordinary.tokens() if len(part)])
        return fit_novelty(tokens, components=self._components)

    def __str__(self) -> str:
        return f"{self._components} principal components of the rows labelled 0"
