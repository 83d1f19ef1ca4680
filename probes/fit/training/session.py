"""What every step of making one detector shares: the rows, the model's reader and the way to a statistic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from probes.card import Format, Stage
from probes.fit.reading.activations import ActivationReader, Activations
from probes.fit.reading.scores import statistic_of
from probes.fit.reading.sequences import Sequences
from probes.fit.reading.weights import is_linear
from probes.fit.rows.dataset import Dataset
from probes.fit.rows.example import Example
from probes.fit.training.linear_probe import LinearProbe
from probes.fit.training.recipe import Recipe
from probes.fit.training.search import Candidate, Features, Probe, score_values
from probes.taps import Tap

__all__ = ["FitSession", "TokenActivations", "features_of", "statistics_of"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenActivations:
    """Activations of every token that is read, where their means do not suffice.

    They stay in memory: 4 x d_model bytes for each token and layer.

    Attributes:
        rows: (T, layers * d_model) float32 of each request, side by side; T may be 0.
        stage: when the statistic is judged.
    """

    rows: Sequence[npt.NDArray[np.float32]]
    stage: Stage

    def sequences(self) -> Features:
        """As a token fitter takes them; a request without a row has one of zeros, and no statistic."""
        there = np.array([len(row) > 0 for row in self.rows], dtype=np.bool_)
        width = max(row.shape[1] for row in self.rows)
        nothing = np.zeros((1, width), dtype=np.float32)
        return Features(Sequences.of(row if len(row) else nothing for row in self.rows), there)

    def token_scores(self, probes: Sequence[LinearProbe]) -> list[Float64]:
        """(T, probes) of each request."""
        weights = np.stack([probe.weight for probe in probes], axis=1)
        biases = np.array([probe.constant for probe in probes])
        return [row.astype(np.float64) @ weights + biases for row in self.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSession:
    """One run of a recipe.

    Attributes:
        recipe: what to do.
        data: rows by use.
        reader: the model.
        skip_first: leading positions that are never scored.
        progress: told what is being done.
        finished: the setting that was chosen, as it is served; None while it is searched for.
    """

    recipe: Recipe
    data: Dataset
    reader: ActivationReader
    skip_first: int
    progress: Callable[[str], None]
    finished: Candidate | None = None

    def finish(self, candidate: Candidate) -> FitSession:
        """The session from here on: what is read suffices for this setting's statistic."""
        return replace(self, finished=candidate)

    def read(self, examples: Sequence[Example], text_format: Format, label: str) -> Activations | TokenActivations:
        """What the statistic needs of some rows: means where it is linear in the token scores, else all tokens."""
        chosen = self.finished
        if chosen and not (
            chosen.aggregate in self.recipe.search.aggregates
            and not chosen.reads_tokens
            and self.recipe.stage is not Stage.STREAM
            and is_linear(chosen.aggregate)
        ):
            return self.read_tokens(examples, text_format, chosen.layers, label)
        return self.read_means(examples, text_format, label)

    def features(self, examples: Sequence[Example], text_format: Format, setting: Candidate, label: str) -> Features:
        """What a setting is fitted on, of some rows."""
        if setting.reads_tokens:
            return features_of(self.read_tokens(examples, text_format, setting.layers, label), setting)
        return features_of(self.read_means(examples, text_format, label), setting)

    def read_means(self, examples: Sequence[Example], text_format: Format, label: str) -> Activations:
        """Means for every layer and aggregate of the search."""
        return self.reader.read(
            examples,
            text_format=text_format,
            aggregates=self.recipe.search.aggregates,
            skip_first=self.skip_first,
            label=label,
            stage=self.recipe.stage,
        )

    def lengths(self, examples: Sequence[Example], text_format: Format) -> npt.NDArray[np.int64]:
        """(n,) tokens of each row that are read, as the server counts them."""
        requests = self.reader.render(examples, text_format=text_format, stage=self.recipe.stage)
        return np.array([len(request.positions(self.skip_first)) for request in requests], dtype=np.int64)

    def read_tokens(
        self, examples: Sequence[Example], text_format: Format, layers: Sequence[int], label: str
    ) -> TokenActivations:
        """Every token that is read, at some layers."""
        taps = [Tap(layer, self.recipe.search.site) for layer in layers]
        requests = self.reader.render(examples, text_format=text_format, stage=self.recipe.stage)
        rows: list[npt.NDArray[np.float32]] = [np.empty((0, 0), dtype=np.float32)] * len(requests)
        for i, found in self.reader.sweep(requests, taps, label=f"{label} ({text_format.value})"):
            # A copy: a slice would keep the other positions of the batch in memory.
            read = requests[i].positions(self.skip_first)
            rows[i] = np.concatenate([found[tap][read] for tap in taps], axis=1)
        return TokenActivations(rows, self.recipe.stage)


def features_of(read: Activations | TokenActivations, candidate: Candidate) -> Features:
    """What a setting is fitted on."""
    if isinstance(read, TokenActivations):
        return read.sequences()
    return Features(read.side_by_side(candidate.layers, candidate.aggregate), read.is_defined(candidate.aggregate))


def statistics_of(probe: Probe, read: Activations | TokenActivations, candidate: Candidate) -> Float64:
    """(n,) served statistic; minus infinity where the request is too short for the aggregate, which never fires."""
    if isinstance(read, TokenActivations) and isinstance(probe, LinearProbe):
        scores = read.token_scores([probe])
        return np.array([statistic_of(candidate.aggregate, read.stage, row) for row in scores])
    features = features_of(read, candidate)
    statistics: Float64 = np.where(features.defined, score_values(probe, features.values), -np.inf)
    return statistics
