"""What every step of making one detector shares: the rows, the model's reader and the way to a statistic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.card import Format
from probes.fit.activations import ActivationReader, Activations
from probes.fit.dataset import Dataset
from probes.fit.example import Example
from probes.fit.linear_probe import LinearProbe
from probes.fit.recipe import Recipe
from probes.fit.search import Candidate

__all__ = ["FitSession", "statistics_of"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSession:
    """One run of a recipe.

    Attributes:
        recipe: what to do.
        data: rows by use.
        reader: the model.
        skip_first: leading positions that are never scored.
        progress: told what is being done.
    """

    recipe: Recipe
    data: Dataset
    reader: ActivationReader
    skip_first: int
    progress: Callable[[str], None]

    def read(self, examples: Sequence[Example], text_format: Format, label: str) -> Activations:
        """Activations of some rows, for every layer and aggregate of the search."""
        return self.reader.read(
            examples,
            text_format=text_format,
            aggregates=self.recipe.search.aggregates,
            skip_first=self.skip_first,
            label=label,
        )


def statistics_of(probe: LinearProbe, read: Activations, candidate: Candidate) -> Float64:
    """The served statistic; minus infinity where the request is too short for the aggregate, which never fires."""
    scores = probe.score(read.at(candidate.layer, candidate.aggregate))
    statistics: Float64 = np.where(read.is_defined(candidate.aggregate), scores, -np.inf)
    return statistics
