"""The fit of a linear detector or an ensemble, to be repeated: on other rows, permuted labels, another model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator, parse_aggregator
from probes.aggregate.mean import Mean
from probes.artifact import Artifact
from probes.card import Calibration, Format, Stage
from probes.fit.evaluation.baselines import labels_of
from probes.fit.fitters import Fitter, parse_fitter
from probes.fit.fitters.logistic import Logistic
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.probe_bank import probe_statistics
from probes.fit.reading.weights import is_linear
from probes.fit.refits import fitter_config
from probes.fit.rows.example import Example
from probes.fit.rows.split import Fold
from probes.fit.training.ensemble import SideBySide
from probes.fit.training.linear_probe import LinearProbe
from probes.fit.training.search import Features
from probes.taps import Tap

__all__ = ["Refit", "Repeatable", "fitter_of"]

Float64 = npt.NDArray[np.float64]

_FALLBACK = Logistic(inverse_penalty=0.01)


class Repeatable(Protocol):
    """The fit of a detector, whatever its kind, to be repeated."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Where is read, all at one site."""
        ...

    @property
    def reads_head(self) -> bool:
        """Whether the model's unembedding takes part."""
        ...

    def fold_scores(
        self,
        reader: ActivationReader,
        examples: Sequence[Example],
        folds: Sequence[Fold],
        text_format: Format,
        *,
        label: str,
    ) -> list[Float64]:
        """For each fold, the statistics of its test rows by a fit on its training rows."""
        ...

    def on_model(
        self,
        reader: ActivationReader,
        model_dir: Path,
        train: Sequence[Example],
        measured: Sequence[Example],
        text_format: Format,
        *,
        label: str,
    ) -> Float64:
        """(measured,) their statistics by a fit on another model's activations of the training rows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """One way to fit linear probes: where is read, and how what is read becomes a probe and a statistic.

    Attributes:
        fitter: of the direction at each tap.
        taps: where is read, all at one site; several are an ensemble's.
        fitted_on: whose weighted means of the activations a probe is fitted on; linear in the scores.
        aggregate: how token scores become the statistic.
        stage: when it is judged.
        skip_first: leading positions that are never read.
    """

    fitter: Fitter
    taps: tuple[Tap, ...]
    fitted_on: Aggregator
    aggregate: Aggregator
    stage: Stage
    skip_first: int

    @classmethod
    def of(cls, artifact: Artifact, calibration: Calibration, *, kinds: Collection[str]) -> Refit:
        """As the card says that the detector was made; see ``fitter_of``.

        For a kind that is not fitted again, a way to read linear probes at its first tap.

        Args:
            artifact: of the detector.
            calibration: aggregate and stage.
            kinds: that are fitted again.
        """
        card = artifact.card
        taps = tuple(Tap.parse(tap) for tap in card.taps)
        again = card.kind in kinds
        # An aggregate of several numbers a token has nothing to take from one direction.
        aggregate = calibration.aggregate if calibration.aggregate.channels == 1 else Mean()
        chosen = card.training.get("chosen")
        named = chosen.get("fitted_on") if isinstance(chosen, dict) else None
        fitted_on = aggregate if named is None else parse_aggregator(named)
        linear = is_linear(fitted_on) if fitted_on.channels == 1 else False
        return cls(
            fitter=fitter_of(artifact)[0] if again else _FALLBACK,
            taps=taps if again else taps[:1],
            fitted_on=fitted_on if linear else Mean(),
            aggregate=aggregate,
            stage=calibration.stage,
            skip_first=card.skip_first,
        )

    @property
    def reads_head(self) -> bool:
        """It never is."""
        return False

    @property
    def is_exact(self) -> bool:
        """Whether the statistic is the score of the very means that are fitted on."""
        return self.stage is not Stage.STREAM and self.fitted_on == self.aggregate

    @property
    def whole_fitter(self) -> Fitter:
        """Of the probe on all taps side by side."""
        count = len(self.taps)
        return self.fitter if count == 1 else SideBySide(member=self.fitter, taps=count)

    def features(
        self, reader: ActivationReader, examples: Sequence[Example], text_format: Format, *, label: str
    ) -> Features:
        """What is fitted on."""
        read = reader.read(
            examples,
            text_format=text_format,
            aggregates=[self.fitted_on],
            skip_first=self.skip_first,
            label=label,
            stage=self.stage,
        )
        layers = [tap.layer for tap in self.taps]
        return Features(read.side_by_side(layers, self.fitted_on), read.is_defined(self.fitted_on))

    def fit(self, features: Features, examples: Sequence[Example], rows: Sequence[int] | None = None) -> LinearProbe:
        """A probe on all rows, or on some."""
        chosen = np.arange(len(examples)) if rows is None else np.asarray(rows)
        return self.whole_fitter.fit(features.means[chosen], labels_of(examples)[chosen])

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
            taps=self.taps,
            aggregate=self.aggregate,
            stage=self.stage,
            skip_first=self.skip_first,
            label=f"{label} ({text_format.value})",
        )

    def on_model(
        self,
        reader: ActivationReader,
        model_dir: Path,
        train: Sequence[Example],
        measured: Sequence[Example],
        text_format: Format,
        *,
        label: str,
    ) -> Float64:
        """See ``Repeatable.on_model``; the folder is not looked at."""
        probe = self.fit(self.features(reader, train, text_format, label=label), train)
        found: Float64 = self.statistics([probe], reader, measured, text_format, label=label)[0]
        return found

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
        if self.is_exact:
            return [
                np.where(features.defined[list(fold.test)], probe.score(features.means[list(fold.test)]), -np.inf)
                for probe, fold in zip(probes, folds, strict=True)
            ]
        found = self.statistics(probes, reader, examples, text_format, label=label)
        return [found[number, list(fold.test)] for number, fold in enumerate(folds)]


def fitter_of(artifact: Artifact) -> tuple[Fitter, str]:
    """The fitter that a card names, and where it comes from, for people; logistic regression if it names none."""
    config = fitter_config(artifact.card)
    if config is None:
        return _FALLBACK, f"{_FALLBACK}, since the card names no fitter"
    fitter = parse_fitter(config)
    return fitter, f"{fitter}, as on the card"
