"""The fit of a detector that is not linear, to be repeated: on other rows, permuted labels, another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.artifact import Artifact
from probes.card import Calibration, Format, Stage
from probes.detectors import Detector, load_detector
from probes.fit.evaluation.baselines import labels_of
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.token_rows import TokenRows
from probes.fit.refits import KindFit
from probes.fit.rows.example import Example
from probes.fit.rows.split import Fold
from probes.fit.training.linear_probe import Labels
from probes.taps import Tap

__all__ = ["TokenRefit"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRefit:
    """One way to fit, on all tokens that are read of the requests. They are kept in memory.

    Attributes:
        artifact: of the detector; its card says where and what is read.
        how: the fit of its kind.
        aggregate: how token scores become the statistic.
        stage: when it is judged.
        known: the training rows, once they have been read.
    """

    artifact: Artifact
    how: KindFit
    aggregate: Aggregator
    stage: Stage
    known: dict[Format, TokenRows] = field(default_factory=dict)

    @classmethod
    def of(cls, artifact: Artifact, calibration: Calibration, how: KindFit) -> TokenRefit:
        """As the card says that the detector was made.

        Args:
            artifact: of the detector.
            calibration: aggregate and stage; a kind that is fitted under one aggregate alone is judged by that.
            how: the fit of its kind.
        """
        aggregate = calibration.aggregate
        if how.aggregate is not None and aggregate.kind == how.aggregate.kind:
            aggregate = how.aggregate
        return cls(artifact=artifact, how=how, aggregate=aggregate, stage=calibration.stage)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Where is read."""
        return self.artifact.taps

    @property
    def reads_head(self) -> bool:
        """Whether the model's unembedding takes part."""
        return self.how.reads_head

    def fold_scores(
        self,
        reader: ActivationReader,
        examples: Sequence[Example],
        folds: Sequence[Fold],
        text_format: Format,
        *,
        label: str,
    ) -> list[Float64]:
        """For each fold, the statistics of its test rows by a detector that was fitted on its training rows."""
        rows, labels = self._train_rows(reader, examples, text_format, label=label), labels_of(examples)
        found = []
        for fold in folds:
            train = list(fold.train)
            detector = self._fitted(rows.some(train), labels[train])
            found.append(rows.some(fold.test).statistics(detector, self.aggregate, self.stage))
        return found

    def shuffled(
        self,
        reader: ActivationReader,
        train: Sequence[Example],
        measured: Sequence[Example],
        text_format: Format,
        *,
        count: int,
        generator: np.random.Generator,
    ) -> list[Float64]:
        """The statistics of the measured rows by fits on permuted labels, one entry for each permutation."""
        rows = self._train_rows(reader, train, text_format, label="training rows")
        tested = self._read(reader, measured, text_format, label="measured rows, controls")
        return [
            tested.statistics(self._fitted(rows, generator.permutation(labels_of(train))), self.aggregate, self.stage)
            for _ in range(count)
        ]

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
        """The statistics of the measured rows by a fit on another model's activations of the training rows."""
        rows = self._read(reader, train, text_format, label=label)
        detector = self._fitted(rows, labels_of(train), other_model=model_dir)
        return self._read(reader, measured, text_format, label=label).statistics(detector, self.aggregate, self.stage)

    def _train_rows(
        self, reader: ActivationReader, examples: Sequence[Example], text_format: Format, *, label: str
    ) -> TokenRows:
        if text_format not in self.known:
            self.known[text_format] = self._read(reader, examples, text_format, label=label)
        return self.known[text_format]

    def _read(
        self, reader: ActivationReader, examples: Sequence[Example], text_format: Format, *, label: str
    ) -> TokenRows:
        card = self.artifact.card
        requests = reader.render(examples, text_format=text_format, stage=self.stage, segments=card.segments)
        (tap,) = self.taps
        return TokenRows.read(
            requests, reader, tap=tap, skip_first=card.skip_first, label=f"{label} ({text_format.value})"
        )

    def _fitted(self, rows: TokenRows, labels: Labels, *, other_model: Path | None = None) -> Detector:
        tensors: Mapping[str, npt.NDArray[np.generic]] = self.how.fit(rows, labels, other_model=other_model)
        return load_detector(replace(self.artifact, tensors=tensors))
