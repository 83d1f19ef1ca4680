"""Probes for notebooks, with scikit-learn's conventions: fit on texts, ask for decisions, calibrate, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from probes.aggregate import Aggregator
from probes.aggregate.mean import Mean
from probes.artifact import Artifact
from probes.cachedir import user_cache_dir
from probes.card import Calibration, Card, Format, Stage
from probes.detectors import load_detector
from probes.errors import TelltaleError
from probes.fit.calibration.calibrate import calibrate
from probes.fit.evaluation.baselines import labels_of
from probes.fit.evaluation.detector_evaluation import DetectorEvaluation
from probes.fit.evaluation.evaluation import Report
from probes.fit.evaluation.evaluation_rows import Rows
from probes.fit.evaluation.text_encoder import InputEmbeddings
from probes.fit.fitters import Fitter
from probes.fit.fitters.logistic import Logistic
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.rendered import Rendered
from probes.fit.reading.scores import score_requests, statistics_of_requests
from probes.fit.reading.sequences import Sequences
from probes.fit.reading.weights import is_linear, score_weights
from probes.fit.rows.example import Example, data_digest
from probes.fit.token_fitters import TokenFitter, TokenProbe
from probes.fit.training.ensemble import SideBySide, ensemble_tensors
from probes.fit.training.linear_probe import LinearProbe
from probes.modelref import read_model_ref
from probes.taps import Site, Tap

__all__ = ["EstimatorError", "ProbeEstimator", "Request"]

Float64 = npt.NDArray[np.float64]
Request = str | Sequence[Mapping[str, str]] | Example
"""A text, a conversation as the chat API takes it, or a row of a data set."""
_NORM_TEST_ROWS = 32


class EstimatorError(TelltaleError, ValueError):
    """A probe cannot be fitted as it was asked for."""


class ProbeEstimator(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """A detector of one model, fitted on labelled requests.

    What is fitted on one layer with a ``Fitter`` is a detector of the kind ``linear``, on several an ``ensemble``; a
    ``TokenFitter`` makes its own kind, on one layer. An aggregate that is not linear in the scores is served as it is
    and fitted on the mean.

    Args:
        model_dir: folder of the model, in transformers' layout.
        layers: to read, 0 = after the first decoder layer.
        site: where in them.
        fitter: how the probe is found; logistic regression if None.
        aggregate: how token scores become the statistic; the mean if None. A token fitter has one of its own.
        text_format: how requests reach the model.
        stage: what is read of them; at ``stream`` and ``response`` each needs a reply.
        model_id: name of the model on the card; the folder's if None.
        cache_dir: for digests of the model's files; the user's own if None.
        progress: told what is being done; nobody if None.

    Attributes:
        classes_: (2,), 0 and 1.
        probe_: what was fitted.
        skip_first_: leading positions with a sink's norm, which are never scored.
        calibrations_: thresholds so far.
    """

    classes_: npt.NDArray[np.int64]
    probe_: LinearProbe | TokenProbe
    skip_first_: int
    calibrations_: tuple[Calibration, ...]

    def __init__(
        self,
        model_dir: Path,
        *,
        layers: Sequence[int],
        site: Site = Site.RESID_POST,
        fitter: Fitter | TokenFitter | None = None,
        aggregate: Aggregator | None = None,
        text_format: Format = Format.CHAT,
        stage: Stage = Stage.PROMPT,
        model_id: str | None = None,
        cache_dir: Path | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.model_dir = model_dir
        self.layers = layers
        self.site = site
        self.fitter = fitter
        self.aggregate = aggregate
        self.text_format = text_format
        self.stage = stage
        self.model_id = model_id
        self.cache_dir = cache_dir
        self.progress = progress

    def fit(self, requests: Sequence[Request], labels: Sequence[int] | npt.NDArray[np.integer]) -> Self:
        """Fit.

        Args:
            requests: n of them.
            labels: (n,), 1 = what the detector is to find, 0 = anything else; both present.
        Raises:
            EstimatorError: labels are others than these, or a token fitter is given several layers.
            TelltaleError: the model cannot be read, or a request has nothing to read at the stage.
        """
        examples = _labelled(requests, labels)
        truth = labels_of(examples)
        self._model = read_model_ref(
            self.model_dir,
            model_id=self.model_id or self.model_dir.name,
            dtype="float32",
            cache_dir=self.cache_dir or user_cache_dir(),
        )
        self._reader = ActivationReader(
            self.model_dir,
            model=self._model,
            layers=self.layers,
            site=self.site,
            cache_dir=self.cache_dir or user_cache_dir(),
            progress=self.progress or (lambda _text: None),
        )
        self.skip_first_ = self._reader.sink_positions(examples[:_NORM_TEST_ROWS], self.text_format)
        self._examples = examples
        rendered = self._render(examples)
        fitter = self.fitter or Logistic(inverse_penalty=0.01)
        if isinstance(fitter, TokenFitter):
            if len(self.layers) != 1:
                raise EstimatorError(f"{fitter.kind!r} reads one layer; {len(self.layers)} were named. Name one.")
            self.probe_ = fitter.fit(self._sequences(rendered), truth)
        else:
            taps = len(self.layers)
            whole = fitter if taps == 1 else SideBySide(member=fitter, taps=taps)
            self.probe_ = whole.fit(self._means(rendered), truth)
        self.classes_ = np.array([0, 1])
        self.calibrations_ = ()
        return self

    def decision_function(self, requests: Sequence[Request]) -> Float64:
        """(n,) the statistic of each request, as it is served; ``-inf`` for one that is too short for the aggregate."""
        check_is_fitted(self, "probe_")
        return self._statistics([_example(request, 0) for request in requests])

    def predict(self, requests: Sequence[Request]) -> npt.NDArray[np.int64]:
        """(n,) 1 where the statistic lies above the newest threshold; above 0 before anything was calibrated."""
        limit = self.calibrations_[-1].threshold if self.calibrations_ else 0.0
        return (self.decision_function(requests) > limit).astype(np.int64)

    def calibrate(
        self, benign: Sequence[Request], *, target_fpr: float = 0.01, confidence: float = 0.95
    ) -> Calibration:
        """Set the threshold by requests that it was not fitted on, none of which should fire.

        Args:
            benign: 299 at least for 1 % at 95 % confidence; with fewer nothing is certified.
            target_fpr: share of such requests that may fire.
            confidence: of that.
        """
        check_is_fitted(self, "probe_")
        examples = [_example(request, 0) for request in benign]
        found = calibrate(
            self._statistics(examples),
            examples,
            stage=self.stage,
            text_format=self.text_format,
            aggregate=self._served,
            target_fpr=target_fpr,
            confidence=confidence,
        )
        self.calibrations_ = (found,)
        return found

    def evaluate(self, requests: Sequence[Request], labels: Sequence[int], *, seed: int = 0) -> Report:
        """Measure on further requests, beside text-only peers and controls that are fitted on the same rows.

        Requests that it was fitted on are left out. It has to be calibrated: that says what the statistic is.

        Args:
            requests: n of them, with both labels.
            labels: (n,), 0 or 1.
            seed: of every draw.
        Raises:
            EstimatorError: labels are others than these.
            EvaluationError: a label is missing in what is left, or it is not calibrated.
        """
        check_is_fitted(self, "probe_")
        found = DetectorEvaluation(
            self.artifact("probe", "being fitted"),
            Rows(measured=_labelled(requests, labels), file="given", train=self._examples, train_file="fitted on"),
            model_dir=self.model_dir,
            model=self._model,
            encoder=lambda: InputEmbeddings(self.model_dir),
            cache_dir=self.cache_dir or user_cache_dir(),
            seed=seed,
            progress=self.progress or (lambda _text: None),
        )
        return found.report(self.stage, [self.text_format], created_by=f"telltale {metadata.version('telltale')}")

    def artifact(self, name: str, description: str) -> Artifact:
        """The detector, with its card; ``save`` writes it.

        Args:
            name: letters, digits and underscores.
            description: what it finds.
        """
        check_is_fitted(self, "probe_")
        return Artifact(Path(f"{name}.safetensors"), self._card(name, description), self._tensors())

    @property
    def _taps(self) -> tuple[Tap, ...]:
        return tuple(Tap(layer, self.site) for layer in self.layers)

    @property
    def _served(self) -> Aggregator:
        return self.probe_.aggregate if isinstance(self.probe_, TokenProbe) else self.aggregate or Mean()

    def _render(self, examples: Sequence[Example]) -> list[Rendered]:
        return self._reader.render(examples, text_format=self.text_format, stage=self.stage)

    def _statistics(self, examples: Sequence[Example]) -> Float64:
        detector = load_detector(self.artifact("probe", "being fitted"))
        (found,) = score_requests(
            [detector], self._render(examples), self._reader, skip_first=[self.skip_first_], label="requests"
        )
        return statistics_of_requests(self._served, self.stage, found)

    def _sequences(self, requests: Sequence[Rendered]) -> Sequences:
        parts: list[npt.NDArray[np.float32]] = [np.empty((0, self._model.d_model), np.float32)] * len(requests)
        for number, found in self._reader.sweep(requests, self._taps, label="requests"):
            parts[number] = found[self._taps[0]][self._first(requests[number]) :].copy()
        return Sequences.of(parts)

    def _tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        if isinstance(self.probe_, TokenProbe) or len(self.layers) == 1:
            return self.probe_.tensors()
        return ensemble_tensors(self.probe_, len(self.layers))

    def _means(self, requests: Sequence[Rendered]) -> npt.NDArray[np.float64]:
        """(n, taps * d_model), weighted as the aggregate weighs the scores.

        The statistic of the scores is then the score of the mean.
        """
        wanted = self.aggregate or Mean()
        aggregate = wanted if is_linear(wanted) else Mean()
        means = np.empty((len(requests), len(self._taps), self._model.d_model))
        for number, found in self._reader.sweep(requests, self._taps, label="requests"):
            first = self._first(requests[number])
            weights = score_weights((aggregate,), len(requests[number].tokens) - first).values[0]
            for place, tap in enumerate(self._taps):
                means[number, place] = weights @ found[tap][first:].astype(np.float64)
        return means.reshape(len(requests), -1)

    def _first(self, request: Rendered) -> int:
        """Position of the first row that is read; the last one where nothing is left, so that every request has one."""
        return min(max(request.first, self.skip_first_), len(request.tokens) - 1)

    def _card(self, name: str, description: str) -> Card:
        probe = self.probe_
        linear = "linear" if len(self.layers) == 1 else "ensemble"
        fitter = self.fitter or Logistic(inverse_penalty=0.01)
        return Card(
            name=name,
            kind=probe.kind if isinstance(probe, TokenProbe) else linear,
            description=description,
            model=self._model,
            taps=tuple(str(tap) for tap in self._taps),
            formats=(self.text_format,),
            skip_first=self.skip_first_,
            tensors_digest="0" * 64,
            calibrations=self.calibrations_,
            training={"fitter": fitter.config(), "data_digest": data_digest(self._examples), "stage": self.stage.value},
            created_by=f"telltale {metadata.version('telltale')}",
        )


def _labelled(requests: Sequence[Request], labels: Sequence[int] | npt.NDArray[np.integer]) -> list[Example]:
    truth = np.asarray(labels, dtype=np.int64)
    if len(truth) != len(requests) or set(truth.tolist()) != {0, 1}:
        raise EstimatorError(
            f"{len(requests)} requests and {len(truth)} labels ({sorted(set(truth.tolist()))}) were given; there "
            "must be as many of one as of the other, and both labels, 0 and 1."
        )
    # A row of a data set has a label of its own; what is given here counts.
    return [replace(_example(request, 0), label=int(label)) for request, label in zip(requests, truth, strict=True)]


def _example(request: Request, label: int) -> Example:
    if isinstance(request, Example):
        return request
    if isinstance(request, str):
        return Example(text=request, label=label, source="given", group=request)
    turns = tuple((message["role"], message["content"]) for message in request)
    response = ""
    if turns and turns[-1][0] == "assistant":
        *earlier, (_, response) = turns
        turns = tuple(earlier)
    if not turns:
        raise EstimatorError("a conversation without a message to answer was given; there is nothing to read.")
    newest = turns[-1][1]
    return Example(text=newest, label=label, source="given", group=newest, turns=turns, response=response)
