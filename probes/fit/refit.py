"""The fit of a linear detector, to be repeated: on other rows, on permuted labels, on another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.aggregate.mean import Mean
from probes.artifact import Artifact
from probes.card import Format, Stage
from probes.fit.activations import ActivationReader
from probes.fit.baselines import labels_of
from probes.fit.example import Example
from probes.fit.fitters import Fitter, parse_fitter
from probes.fit.fitters.logistic import Logistic
from probes.fit.linear_probe import LinearProbe
from probes.fit.probe_bank import probe_statistics
from probes.fit.search import Features
from probes.fit.split import Fold
from probes.fit.weights import is_linear
from probes.taps import Tap

__all__ = ["Refit", "fitter_of"]

Float64 = npt.NDArray[np.float64]

_FALLBACK = Logistic(inverse_penalty=0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """One way to fit: where is read, and how what is read becomes a probe and a statistic.

    A probe is fitted on what the aggregate gives, where that is linear in the scores, else on the mean over tokens.

    Attributes:
        fitter: of the direction.
        tap: where is read.
        aggregate: how token scores become the statistic.
        stage: when it is judged.
        skip_first: leading positions that are never read.
    """

    fitter: Fitter
    tap: Tap
    aggregate: Aggregator
    stage: Stage
    skip_first: int

    @property
    def is_linear(self) -> bool:
        """Whether the statistic is linear in the activations, so that what is fitted on says all about it."""
        return self.stage is not Stage.STREAM and is_linear(self.aggregate)

    def features(
        self, reader: ActivationReader, examples: Sequence[Example], text_format: Format, *, label: str
    ) -> Features:
        """What is fitted on."""
        aggregate = self.aggregate if self.is_linear else Mean()
        read = reader.read(
            examples,
            text_format=text_format,
            aggregates=[aggregate],
            skip_first=self.skip_first,
            label=label,
            stage=self.stage,
        )
        return Features(read.at(self.tap.layer, aggregate), read.is_defined(aggregate))

    def fit(self, features: Features, examples: Sequence[Example], rows: Sequence[int] | None = None) -> LinearProbe:
        """A probe on all rows, or on some."""
        chosen = np.arange(len(examples)) if rows is None else np.asarray(rows)
        return self.fitter.fit(features.values[chosen], labels_of(examples)[chosen])

    def statistics(
        self,
        probes: Sequence[LinearProbe],
        reader: ActivationReader,
        examples: Sequence[Example],
        text_format: Format,
        *,
        label: str,
    ) -> Float64:
        """(probes, examples): what each probe would be judged by."""
        return probe_statistics(
            probes,
            reader.render(examples, text_format=text_format, stage=self.stage),
            reader,
            tap=self.tap,
            aggregate=self.aggregate,
            stage=self.stage,
            skip_first=self.skip_first,
            label=f"{label} ({text_format.value})",
        )

    def fold_scores(
        self,
        reader: ActivationReader,
        examples: Sequence[Example],
        folds: Sequence[Fold],
        text_format: Format,
        *,
        label: str,
    ) -> list[Float64]:
        """For each fold, the statistics of its test rows by a probe that was fitted on its training rows."""
        features = self.features(reader, examples, text_format, label=label)
        probes = [self.fit(features, examples, fold.train) for fold in folds]
        if self.is_linear:
            return [
                np.where(features.defined[list(fold.test)], probe.score(features.values[list(fold.test)]), -np.inf)
                for probe, fold in zip(probes, folds, strict=True)
            ]
        found = self.statistics(probes, reader, examples, text_format, label=label)
        return [found[number, list(fold.test)] for number, fold in enumerate(folds)]


def fitter_of(artifact: Artifact) -> tuple[Fitter, str]:
    """The fitter that a card names, and where it comes from, for people; logistic regression if it names none."""
    chosen = artifact.card.training.get("chosen")
    config = chosen.get("fitter") if isinstance(chosen, dict) else None
    if config is None:
        return _FALLBACK, f"{_FALLBACK}, since the card names no fitter"
    fitter = parse_fitter(config)
    return fitter, f"{fitter}, as on the card"
