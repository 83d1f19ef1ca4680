"""Evaluates a detector of any kind with its model: scores rows, repeats its fit, measures what stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact
from probes.card import Calibration, Format, ModelRef, Stage
from probes.fit.evaluation.baselines import EmbeddingPeer, TextEncoder, TextPeer, TfIdfPeer
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.cross_source import (
    FoldScores,
    in_distribution,
    leave_one_out,
    peer_scores,
    random_folds,
    source_folds,
)
from probes.fit.evaluation.evaluate import (
    ScoredRows,
    compare,
    histogram,
    labels_of,
    limits_of,
    report_reliability,
    report_slices,
    report_threshold,
    trivial_in,
)
from probes.fit.evaluation.evaluation import Absent, DetectorRef, FormatReport, Report, SweepPoint
from probes.fit.evaluation.evaluation_rows import EvaluationError, Rows, data_ref
from probes.fit.evaluation.model_controls import NUM_SHUFFLED, knowing_nothing, on_random_weights
from probes.fit.evaluation.refit import Refit, Repeatable, fitter_of
from probes.fit.evaluation.resampling import RESAMPLES
from probes.fit.evaluation.stream_delay import stream_delay
from probes.fit.evaluation.token_refit import TokenRefit
from probes.fit.evaluation.verdict import least
from probes.fit.evaluation.weigh import Home, weigh
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.scores import read_scores, statistics_of_requests
from probes.fit.refits import KindFit, RefitError, kind_fit
from probes.fit.training.linear_probe import LinearProbe, standard_units
from probes.taps import Tap

__all__ = ["DetectorEvaluation"]

Float64 = npt.NDArray[np.float64]

_LINEAR = frozenset({"linear", "ensemble"})
"""The kinds that are fitted as one linear probe, on one layer or on several side by side."""
_NO_TRAINING_ROWS = "it needs the training rows (--train)"


class DetectorEvaluation:
    """One detector, its model and rows; a report is made of them for each stage.

    Args:
        artifact: of the detector.
        rows: to measure on, and those that it was fitted on where they are to be had.
        model_dir: folder of the model, in transformers' layout.
        model: which model that is.
        encoder: makes the encoder of the text-only peer with embeddings; called only if there are training rows.
        cache_dir: where scores and features are kept.
        seed: of every draw.
        progress: told what is being done.
    Raises:
        EvaluationError: a label is missing.
        probes.artifact.ArtifactError: the detector belongs to another model.
    """

    def __init__(
        self,
        artifact: Artifact,
        rows: Rows,
        *,
        model_dir: Path,
        model: ModelRef,
        encoder: Callable[[], TextEncoder],
        cache_dir: Path,
        seed: int,
        progress: Callable[[str], None],
    ) -> None:
        artifact.require_model(model)
        self._artifact, self._rows, self._seed = artifact, rows, seed
        self._model_dir, self._model, self._cache_dir = model_dir, model, cache_dir
        self._progress = progress
        self._measured, self._split = rows.apart()
        self._taps = tuple(Tap.parse(tap) for tap in artifact.card.taps)
        self._reader = ActivationReader(
            model_dir,
            model=model,
            layers=sorted({tap.layer for tap in self._taps}),
            site=self._taps[0].site,
            cache_dir=cache_dir,
            progress=progress,
        )
        self._how, self._why_not = _fit_of(artifact)
        self._refits = rows.train is not None and not self._why_not
        self._folds = source_folds(rows.train, seed=seed) if rows.train is not None and self._refits else []
        self._peers: Mapping[Control, Float64] = {}
        self._peer_folds: Sequence[Mapping[Control, Float64]] = []
        if rows.train is not None:
            progress("training the text-only peers")
            peers: list[TextPeer] = [TfIdfPeer(), EmbeddingPeer(encoder())]
            self._peers = {peer.control: peer.scores(rows.train, self._measured) for peer in peers}
            self._peer_folds = peer_scores(peers, rows.train, self._folds)

    def report(self, stage: Stage, formats: Sequence[Format], *, created_by: str) -> Report:
        """Measure at one stage.

        Args:
            stage: when the statistic is judged.
            formats: each needs a calibration at the stage, which says what the statistic is.
            created_by: for the report.
        Raises:
            EvaluationError: the card has no calibration for a format at the stage.
            probes.fit.reading.rendered.RenderError: a row has nothing to read at the stage.
        """
        calibrations = {text_format: self._calibration(stage, text_format) for text_format in formats}
        found = {text_format: self._format(calibration) for text_format, calibration in calibrations.items()}
        card, train = self._artifact.card, self._rows.train
        return Report(
            detector=DetectorRef(
                name=card.name,
                kind=card.kind,
                tensors_digest=card.tensors_digest,
                model_id=card.model.id,
                weight_digest=card.model.weight_digest,
            ),
            stage=stage,
            data=data_ref(self._rows.file, self._measured),
            training_data=None if train is None else data_ref(self._rows.train_file, train),
            split=self._split,
            seed=self._seed,
            resamples=RESAMPLES,
            refit=self._refit_says(),
            notes=self._notes(stage),
            layer_sweep=_sweep(card.training),
            formats=found,
            verdict=least({text_format.value: report.verdict for text_format, report in found.items()}),
            created_by=created_by,
        )

    def _format(self, calibration: Calibration) -> FormatReport:
        stage, text_format = calibration.stage, calibration.format
        scores = read_scores(
            [self._artifact],
            self._measured,
            self._reader,
            text_format=text_format,
            stage=stage,
            cache_dir=self._cache_dir,
            label="measured rows",
        )[0]
        statistics = statistics_of_requests(calibration.aggregate, stage, scores)
        linear = Refit.of(self._artifact, calibration, kinds=_LINEAR)
        refit = TokenRefit.of(self._artifact, calibration, self._how) if self._how is not None else linear
        peers = dict(self._peers)
        if self._refits and self._rows.train is not None:
            peers[Control.RANDOM_INIT] = on_random_weights(
                refit,
                self._measured,
                text_format,
                train=self._rows.train,
                model_dir=self._model_dir,
                model=self._model,
                cache_dir=self._cache_dir,
                seed=self._seed,
                progress=self._progress,
            )
        tested = ScoredRows(
            examples=self._measured,
            scores=statistics,
            peers=peers,
            bands=self._bands(linear, refit, text_format),
            absent=self._absent(),
        )
        labels = labels_of(self._measured)
        table = compare(tested, seed=self._seed)
        home = self._home(refit, text_format)
        lengths = [len(request.scores) for request in scores]
        return FormatReport(
            aggregate=calibration.aggregate,
            table=table,
            threshold=report_threshold(calibration, statistics, labels, lengths),
            slices=report_slices(tested, lengths, limits=limits_of(calibration, lengths), seed=self._seed),
            histogram=histogram(statistics, labels),
            reliability=None
            if calibration.platt is None
            else report_reliability(calibration.platt, statistics, self._measured, seed=self._seed),
            delay=stream_delay(calibration, self._measured, scores, self._reader) if stage is Stage.STREAM else None,
            leave_one_out=home.leave_one_out,
            in_distribution=home.in_distribution,
            trivial_in_training=dict(home.trivial),
            verdict=weigh(table, self._split.policy, home),
        )

    def _bands(self, linear: Refit, refit: Repeatable, text_format: Format) -> dict[Control, Sequence[Float64]]:
        """What is drawn many times: random directions, and the detector's own fit on permuted labels."""
        train = self._rows.train if self._refits else None
        bands = knowing_nothing(
            linear,
            self._units(linear, text_format),
            self._reader,
            self._measured,
            text_format,
            train=train if self._how is None else None,
            seed=self._seed,
        )
        if isinstance(refit, TokenRefit) and refit.how.uses_labels and train is not None:
            bands[Control.SHUFFLED_LABELS] = refit.shuffled(
                self._reader,
                train,
                self._measured,
                text_format,
                count=NUM_SHUFFLED,
                generator=np.random.default_rng(self._seed),
            )
        return bands

    def _home(self, refit: Repeatable, text_format: Format) -> Home:
        """What the training rows tell of the fit."""
        train = self._rows.train
        if train is None:
            return Home()
        if not self._refits:
            return Home(trivial=trivial_in(train))
        careless = random_folds(train, seed=self._seed)
        found = refit.fold_scores(self._reader, train, [*self._folds, *careless], text_format, label="training rows")
        left_out = [
            FoldScores(fold=fold, detector=scores, peers=peers)
            for fold, scores, peers in zip(self._folds, found[: len(self._folds)], self._peer_folds, strict=True)
        ]
        at_random = [
            FoldScores(fold=fold, detector=scores, peers={})
            for fold, scores in zip(careless, found[len(self._folds) :], strict=True)
        ]
        return Home(
            leave_one_out=leave_one_out(train, left_out, seed=self._seed),
            in_distribution=in_distribution(train, at_random, seed=self._seed),
            trivial=trivial_in(train),
        )

    def _units(self, refit: Refit, text_format: Format) -> LinearProbe:
        """The units of each dimension, in which random directions are drawn."""
        if self._artifact.card.kind in _LINEAR:
            tensors = {name: np.asarray(tensor, np.float32).ravel() for name, tensor in self._artifact.tensors.items()}
            return LinearProbe(tensors["direction"], tensors["mean"], tensors["scale"], 0.0)
        features = refit.features(self._reader, self._measured, text_format, label="measured rows")
        mean, scale = standard_units(features.means)
        return LinearProbe(np.zeros_like(mean), mean, scale, 0.0)

    def _calibration(self, stage: Stage, text_format: Format) -> Calibration:
        card = self._artifact.card
        for calibration in card.calibrations:
            if (calibration.stage, calibration.format) == (stage, text_format):
                return calibration
        known = sorted({f"{item.stage.value} in {item.format.value}" for item in card.calibrations})
        raise EvaluationError(
            f"{self._artifact.path}: the card has no calibration at the stage {stage.value!r} in the format "
            f"{text_format.value!r}, so nobody has said what the statistic is. It has: {', '.join(known) or 'none'}. "
            "Name one of these, or calibrate it first (telltale calibrate)."
        )

    def _absent(self) -> tuple[Absent, ...]:
        if self._rows.train is None:
            lacking = (Control.TF_IDF, Control.SENTENCE_EMBEDDING, Control.SHUFFLED_LABELS, Control.RANDOM_INIT)
            return tuple(Absent(name=control, reason=_NO_TRAINING_ROWS) for control in lacking)
        if self._refits and (self._how is None or self._how.uses_labels):
            return ()
        if self._refits:
            reason = f"no label takes part in the fit of a detector of kind {self._artifact.card.kind!r}"
            return (Absent(name=Control.SHUFFLED_LABELS, reason=reason, applies=False),)
        reason = self._why_not
        return tuple(
            Absent(name=control, reason=reason, applies=False)
            for control in (Control.SHUFFLED_LABELS, Control.RANDOM_INIT)
        )

    def _refit_says(self) -> str:
        if self._rows.train is None:
            return "not repeated: the training rows were not given"
        if not self._refits:
            return f"not repeated: {self._why_not}"
        source = str(self._how) if self._how is not None else fitter_of(self._artifact)[1]
        return source if self._folds else f"{source}; no source can be left out: too few sources, or rows in them"

    def _notes(self, stage: Stage) -> tuple[str, ...]:
        notes = []
        card, train = self._artifact.card, self._rows.train
        digests = card.training.get("data_digests")
        known = digests.get("train") if isinstance(digests, dict) else None
        if train is not None and known is not None and data_ref("", train).digest != known:
            notes.append(
                "The training rows given are not those on the card (another digest): the text-only peers and the "
                "repeated fits rest on the rows given."
            )
        for label, word in ((1, "positive"), (0, "negative")):
            if len({row.group for row in self._measured if row.label == label}) == 1:
                notes.append(
                    f"All {word} rows stand in one group: the intervals hold given that group, and say nothing about "
                    "others."
                )
        if stage is Stage.STREAM:
            positives = [row for row in self._measured if row.label]
            marked = sum(row.onset is not None for row in positives)
            notes.append(
                f"The onset is marked in {marked} of {len(positives)} positive rows; elsewhere the delay is counted "
                "from the first token that is read."
            )
        return tuple(notes)


def _fit_of(artifact: Artifact) -> tuple[KindFit | None, str]:
    """How a detector that is not linear is fitted again, and why it is not; of a linear one neither."""
    card = artifact.card
    if card.kind in _LINEAR:
        why = "linear probes are fitted again on whole prompts, not on segments" if card.segments else ""
        return None, f"a detector of kind {card.kind!r} is not fitted again: {why}" if why else ""
    try:
        return kind_fit(artifact), ""
    except RefitError as error:
        return None, f"a detector of kind {card.kind!r} is not fitted again: {error}"


def _sweep(training: Mapping[str, object]) -> tuple[SweepPoint, ...]:
    """The settings that the card's training record names: the best of each layer, else the best of all."""
    listed = training.get("layers") or training.get("search") or ()
    if not isinstance(listed, Sequence):
        return ()
    return tuple(
        SweepPoint(layer=layer, aggregate=str(aggregate), fitter=str(fitter), auroc=value)
        for layer, aggregate, fitter, value in listed
        if isinstance(layer, int)
    )
