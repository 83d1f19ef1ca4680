"""What a detector is fitted on, over all formats that a recipe trains on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from probes.card import Format
from probes.fit.evaluation.baselines import labels_of
from probes.fit.reading.activations import Activations
from probes.fit.training.linear_probe import Labels
from probes.fit.training.search import Candidate, Features
from probes.fit.training.session import FitSession, TokenActivations, features_of

__all__ = ["StackedRows"]


class StackedRows:
    """The training rows in all training formats at once: those of a further format follow those of the first.

    Args:
        session: rows and reader.
        means: of the training rows, by format.

    Attributes:
        labels: (n,), once for each format.
    """

    def __init__(self, session: FitSession, means: Mapping[Format, Activations]) -> None:
        self._session = session
        self._means = means
        self._tokens: dict[tuple[int, ...], Features] = {}
        self.labels: Labels = np.tile(labels_of(session.data.train), len(means))

    def features(self, setting: Candidate) -> Features:
        """What a setting is fitted on."""
        if setting.reads_tokens:
            if setting.layers not in self._tokens:
                self._tokens = {setting.layers: self._read_tokens(setting)}
            return self._tokens[setting.layers]
        parts = [features_of(read, setting) for read in self._means.values()]
        return Features(
            np.concatenate([part.means for part in parts]),
            np.concatenate([part.defined for part in parts]),
        )

    def _read_tokens(self, setting: Candidate) -> Features:
        session = self._session
        reads = [
            session.read_tokens(session.data.train, text_format, setting.layers, "tokens of training rows")
            for text_format in self._means
        ]
        return TokenActivations([row for read in reads for row in read.rows], session.recipe.stage).sequences()
