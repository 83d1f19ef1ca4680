"""What it takes to repeat the fit of a kind of detector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.artifact import Artifact
from probes.card import ArtifactCard
from probes.errors import TelltaleError
from probes.fit.reading.token_rows import TokenRows
from probes.fit.training.linear_probe import Labels

__all__ = ["KindFit", "RefitError", "Tensors", "fitter_config"]

Tensors = Mapping[str, npt.NDArray[np.generic]]


class RefitError(TelltaleError, ValueError):
    """A fit cannot be repeated; the text says why."""


class KindFit(ABC):
    """The fit of one kind of detector, as a card describes it. Subclasses are found by their detector's ``kind``."""

    kind: ClassVar[str]
    uses_labels: ClassVar[bool] = True
    """Whether labels take part: if not, there is nothing to permute."""
    reads_head: ClassVar[bool] = False
    """Whether it looks at the model's unembedding."""

    @classmethod
    @abstractmethod
    def of(cls, artifact: Artifact) -> Self:
        """As the card says that the detector was made.

        Raises:
            RefitError: the card does not say enough.
        """

    @abstractmethod
    def fit(self, rows: TokenRows, labels: Labels, *, other_model: Path | None) -> Tensors:
        """The tensors of a detector of this kind.

        Args:
            rows: of n requests.
            labels: (n,), 0 or 1, both present.
            other_model: folder of the model that the rows are of; None: the detector's own.
        Raises:
            TelltaleError: the rows do not suffice.
        """

    @property
    def aggregate(self) -> Aggregator | None:
        """The only one that it is fitted under; None: any."""
        return None

    @abstractmethod
    def __str__(self) -> str:
        """How it is fitted, for people."""


def fitter_config(card: ArtifactCard) -> object:
    """The fitter that a card names, whoever wrote it; None if it names none."""
    chosen = card.training.get("chosen")
    return chosen.get("fitter") if isinstance(chosen, dict) else card.training.get("fitter")
