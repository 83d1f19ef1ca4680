"""Calibrates finished detectors on requests of one's own: benign ones for the threshold, labelled ones for Platt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probes.aggregate import Aggregator
from probes.artifact import Artifact
from probes.card import Calibration, Card, Format, Stage
from probes.detectors import load_detector, unfit_aggregate
from probes.fit.calibration.buckets import edges_where_it_grows, merged_edges
from probes.fit.calibration.calibrate import CalibrationError, Float64, Lengths, Promise, calibrate
from probes.fit.calibration.platt import fit_platt
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.scores import RequestScores, read_scores, statistics_of_requests
from probes.fit.rows.example import Example

__all__ = ["Calibrator", "aggregate_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrator:
    """One run over some requests.

    Attributes:
        reader: of the model, as far up as the detectors read; see ``probes.fit.reading.scores.open_reader``.
        cache_dir: where scores are kept.
        stage: when the statistic is judged.
        formats: how the requests are presented; empty: as each card says.
        aggregate: how token scores become the statistic; None: as each card says.
        edges: of length buckets; None: where the statistic grows with length, empty: nowhere.
    """

    reader: ActivationReader
    cache_dir: Path
    stage: Stage
    formats: tuple[Format, ...] = ()
    aggregate: Aggregator | None = None
    edges: tuple[int, ...] | None = None

    def run(
        self,
        artifacts: Sequence[Artifact],
        promises: Sequence[Promise],
        benign: Sequence[Example],
        labelled: Sequence[Example] = (),
    ) -> list[list[Calibration]]:
        """For each artifact, a calibration in each format.

        Args:
            artifacts: of the reader's model.
            promises: for each of them, what its thresholds are to promise.
            benign: requests with label 0.
            labelled: requests of both labels, if the statistic is to become a probability too.
        Raises:
            CalibrationError: there are no benign requests, one is labelled 1, or a card does not say the aggregate.
            TelltaleError: a request has nothing to read at the stage, or too few are labelled.
        """
        if not benign:
            raise CalibrationError("there are no benign requests. Give a file with some, one a line.")
        if wrong := sum(example.label for example in benign):
            raise CalibrationError(
                f"{wrong} of the {len(benign)} benign requests are labelled 1. A threshold rests on requests that must "
                "not fire: leave them out, or give them as labelled requests."
            )
        aggregates = [self._fitting(artifact) for artifact in artifacts]
        found: list[list[Calibration]] = [[] for _ in artifacts]
        for text_format in Format:
            chosen = [
                number
                for number, artifact in enumerate(artifacts)
                if text_format in (self.formats or artifact.card.formats)
            ]
            if not chosen:
                continue
            some = [artifacts[number] for number in chosen]
            scored = self._read(some, benign, text_format, "benign requests")
            judged = self._read(some, labelled, text_format, "labelled requests")
            for place, number in enumerate(chosen):
                made = self._calibrate(
                    artifacts[number],
                    aggregates[number],
                    promises[number],
                    benign=benign,
                    scored=scored[place],
                    text_format=text_format,
                )
                if labelled:
                    statistics = statistics_of_requests(made.aggregate, self.stage, judged[place])
                    made = made.model_copy(update={"platt": fit_platt(statistics, labelled)})
                found[number].append(made)
        return found

    def _read(
        self, artifacts: Sequence[Artifact], examples: Sequence[Example], text_format: Format, label: str
    ) -> list[list[RequestScores]]:
        if not examples:
            return []
        return read_scores(
            artifacts,
            examples,
            self.reader,
            text_format=text_format,
            stage=self.stage,
            cache_dir=self.cache_dir,
            label=label,
        )

    def _fitting(self, artifact: Artifact) -> Aggregator:
        """The aggregate, if the detector's kind goes with it."""
        aggregate = self.aggregate or aggregate_of(artifact.card, self.stage)
        if problem := unfit_aggregate(load_detector(artifact), aggregate):
            raise CalibrationError(f"detector {artifact.card.name!r}: {problem}")
        return aggregate

    def _calibrate(
        self,
        artifact: Artifact,
        aggregate: Aggregator,
        promise: Promise,
        *,
        benign: Sequence[Example],
        scored: Sequence[RequestScores],
        text_format: Format,
    ) -> Calibration:
        statistics = statistics_of_requests(aggregate, self.stage, scored)
        lengths = np.array([len(request.scores) for request in scored], dtype=np.int64)
        return calibrate(
            statistics,
            benign,
            stage=self.stage,
            text_format=text_format,
            aggregate=aggregate,
            target_fpr=promise.target_fpr,
            confidence=promise.confidence,
            method=promise.method,
            lengths=lengths,
            edges=self._edges(artifact, statistics, lengths, promise),
        )

    def _edges(self, artifact: Artifact, statistics: Float64, lengths: Lengths, promise: Promise) -> tuple[int, ...]:
        if artifact.card.segments:
            # The server counts the tokens of the whole prompt, whoever's are read.
            if self.edges:
                raise CalibrationError(
                    f"detector {artifact.card.name!r} reads the text of {', '.join(artifact.card.segments)} alone: it "
                    "has no thresholds by length. Leave --buckets out."
                )
            return ()
        if self.edges is not None and self.stage is not Stage.STREAM:
            return merged_edges(statistics, lengths, self.edges, needed=promise.needed)
        return edges_where_it_grows(statistics, lengths, stage=self.stage, needed=promise.needed)


def aggregate_of(card: Card, stage: Stage) -> Aggregator:
    """The aggregate that a card has calibrated for a stage, else the one that it has for another.

    Raises:
        CalibrationError: it has none.
    """
    known = sorted(card.calibrations, key=lambda calibration: calibration.stage is not stage)
    if not known:
        raise CalibrationError(
            f"detector {card.name!r} has never been calibrated: nothing says how its token scores become one number. "
            "Say it: --aggregate max, or --aggregate ema,alpha=0.12."
        )
    return known[0].aggregate
