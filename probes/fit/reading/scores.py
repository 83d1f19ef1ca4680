"""Scores of every token that a server would read, for detectors of any kind, computed offline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from probes.aggregate import Aggregator
from probes.artifact import Artifact
from probes.card import Format, ModelRef, Stage
from probes.detectors import Detector, load_detector
from probes.errors import TelltaleError
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.rendered import Rendered
from probes.fit.rows.example import Example
from probes.taps import Tap

__all__ = [
    "ActivationSource",
    "RequestScores",
    "ScoreError",
    "open_reader",
    "read_scores",
    "running_statistic",
    "score_requests",
    "statistic_of",
    "statistics_of_requests",
]

Float64 = npt.NDArray[np.float64]

_NOT_SCORED_BY = {"name", "description", "tensors_digest", "training", "evaluation", "created_by", "formats"}
_NOT_SCORED_BY |= {"calibrations", "canary", "segments"}
"""Fields of a card that change no score of the requests as they are rendered."""
_LAYOUT = b"scores with the row before"
"""Of a file in the cache."""


class ScoreError(TelltaleError, ValueError):
    """Requests cannot be scored."""


@dataclass(frozen=True, slots=True)
class RequestScores:
    """The scores of one request's read sequence.

    Attributes:
        scores: (T,) float64, or (T, channels) for a detector with several numbers a token; T may be 0.
        first: position of the first of them in the request; the others follow it, but for those that are not read.
        before: (1,) or (1, channels), the score of the row before them, for aggregates that compare with it; of length
            0 where there is none that may be read.
    """

    scores: Float64
    first: int
    before: Float64 = field(default_factory=lambda: np.empty(0))

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """(T,)."""
        return np.arange(self.first, self.first + len(self.scores))


class ActivationSource(Protocol):
    """Where activations of requests come from: a model that is run, or files of what one computed."""

    def sweep(
        self, requests: Sequence[Rendered], taps: Sequence[Tap], *, label: str
    ) -> Iterator[tuple[int, Mapping[Tap, npt.NDArray[np.float32]]]]:
        """One request at a time, in any order: its number, and (its tokens, d_model) at each tap."""
        ...


def open_reader(
    artifacts: Sequence[Artifact], model_dir: Path, *, model: ModelRef, cache_dir: Path, progress: Callable[[str], None]
) -> ActivationReader:
    """A reader of the model as far up as the detectors read.

    Args:
        artifacts: of the detectors.
        model_dir: folder in transformers' layout.
        model: which model that is.
        cache_dir: where what was read is kept.
        progress: told how far it is.
    Raises:
        ArtifactError: a detector belongs to another model.
    """
    for artifact in artifacts:
        artifact.require_model(model)
    layers = sorted({Tap.parse(tap).layer for artifact in artifacts for tap in artifact.card.taps})
    return ActivationReader(model_dir, model=model, layers=layers, cache_dir=cache_dir, progress=progress)


def read_scores(
    artifacts: Sequence[Artifact],
    examples: Sequence[Example],
    reader: ActivationReader,
    *,
    text_format: Format,
    stage: Stage,
    cache_dir: Path,
    label: str,
) -> list[list[RequestScores]]:
    """Scores of every example by every detector, from the cache where they were computed before.

    The model runs once for all detectors that are not in the cache.

    Args:
        artifacts: of the detectors; of the reader's model.
        examples: to score.
        reader: see ``open_reader``.
        text_format: how the examples' texts reach the model.
        stage: what is read of them.
        cache_dir: scores are kept in ``scores`` in it.
        label: what the examples are, for progress.
    Returns: for each artifact, the scores of each example.

    Raises:
        probes.fit.reading.rendered.RenderError: an example has nothing to read at the stage.
        ScoreError: a score is NaN or infinite.
    """
    by_segments = {
        segments: reader.render(examples, text_format=text_format, stage=stage, segments=segments)
        for segments in dict.fromkeys(artifact.card.segments for artifact in artifacts)
    }
    paths = [
        cache_dir / "scores" / f"{_key(artifact, by_segments[artifact.card.segments])}.safetensors"
        for artifact in artifacts
    ]
    for segments, requests in by_segments.items():
        missing = [
            number
            for number, artifact in enumerate(artifacts)
            if artifact.card.segments == segments and not paths[number].is_file()
        ]
        if not missing:
            continue
        chosen = [artifacts[number] for number in missing]
        found = score_requests(
            [load_detector(artifact) for artifact in chosen],
            requests,
            reader,
            skip_first=[artifact.card.skip_first for artifact in chosen],
            label=f"{label} ({text_format.value}, {stage.value})",
        )
        for number, scores in zip(missing, found, strict=True):
            _save(paths[number], scores)
    return [_load(path) for path in paths]


def score_requests(
    detectors: Sequence[Detector],
    requests: Sequence[Rendered],
    source: ActivationSource,
    *,
    skip_first: Sequence[int],
    label: str,
) -> list[list[RequestScores]]:
    """Scores of every request by every detector, in one pass; activations are let go as soon as they are scored.

    Args:
        detectors: of any kind.
        requests: what to read.
        source: of their activations.
        skip_first: for each detector, the leading positions that it does not score.
        label: what the requests are, for progress.
    Returns: for each detector, the scores of each request.

    Raises:
        ScoreError: a score is NaN or infinite.
    """
    found: list[list[RequestScores | None]] = [[None] * len(requests) for _ in detectors]
    taps = sorted({directions.tap for detector in detectors for directions in detector.directions()})
    for number, activations in source.sweep(requests, taps, label=label):
        for detector, skipped, row in zip(detectors, skip_first, found, strict=True):
            positions = requests[number].positions(skipped)
            first = int(positions[0]) if len(positions) else len(requests[number].tokens)
            before = np.arange(first - 1, first) if first > skipped else np.arange(0)
            wanted = np.concatenate([before, positions])
            scores = detector.score(detector.read({tap: rows[wanted] for tap, rows in activations.items()}))
            if not np.isfinite(scores).all():
                raise ScoreError(
                    f"detector {detector.name!r}: {int(np.sum(~np.isfinite(scores)))} scores of request {number} are "
                    "NaN or infinite. The server would count them as gaps; leave the request out or train again."
                )
            row[number] = RequestScores(scores[len(before) :], first, scores[: len(before)])
    complete = [[scores for scores in row if scores is not None] for row in found]
    if any(len(row) != len(requests) for row in complete):
        raise ScoreError(f"{label}: activations of some of the {len(requests)} requests are missing. Read them again.")
    return complete


def statistic_of(aggregate: Aggregator, stage: Stage, scores: Float64, *, before: Float64 | None = None) -> float:
    """The number that a rule compares with its threshold, from a fresh state.

    At ``prompt`` and ``response`` the aggregate's value after the last token that is read, at ``stream`` the largest
    of its values; minus infinity where it is never defined.

    Args:
        aggregate: how scores become one number.
        stage: when it is judged.
        scores: (T,) or (T, channels) float64.
        before: (0 or 1,), or with channels, the score of the row before; used by aggregates that compare with it.
    """
    running = running_statistic(aggregate, scores, before=before)
    if len(running) == 0:
        return -np.inf
    return float(running.max() if stage is Stage.STREAM else running[-1])


def running_statistic(aggregate: Aggregator, scores: Float64, *, before: Float64 | None = None) -> Float64:
    """(T,) the aggregate's value after each score, from a fresh state; see ``statistic_of``."""
    number = len(before) if before is not None and aggregate.reads_before else 0
    values = np.concatenate([before, scores]) if before is not None and number else scores
    if len(scores) == 0:
        return np.empty(0)
    running: Float64 = aggregate.update(aggregate.new_state(1, 1), values.reshape(len(values), 1, -1))[number:, 0, 0]
    return running


def statistics_of_requests(aggregate: Aggregator, stage: Stage, requests: Sequence[RequestScores]) -> Float64:
    """(n,) statistic of each request; see ``statistic_of``."""
    found = [statistic_of(aggregate, stage, request.scores, before=request.before) for request in requests]
    return np.array(found, dtype=np.float64)


def _key(artifact: Artifact, requests: Sequence[Rendered]) -> str:
    """Of the detector with its model, and the requests: their tokens say format, stage and texts."""
    digest = hashlib.sha256(_LAYOUT)
    card = artifact.card.model_dump(mode="json", exclude=_NOT_SCORED_BY)
    card["model"].pop("id")
    digest.update(json.dumps(card, sort_keys=True).encode())
    for name in sorted(artifact.tensors):
        tensor = np.ascontiguousarray(artifact.tensors[name])
        digest.update(f"{name}:{tensor.dtype}:{tensor.shape};".encode())
        digest.update(tensor.tobytes())
    for request in requests:
        digest.update(f"{request.first}:{','.join(map(str, request.tokens))};".encode())
        if request.only is not None:
            digest.update(f"only {','.join(map(str, request.only))};".encode())
    return digest.hexdigest()


def _save(path: Path, scores: Sequence[RequestScores]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    arrays = {
        "scores": np.concatenate([part for request in scores for part in (request.before, request.scores)]),
        "lengths": np.array([[len(request.before), len(request.scores)] for request in scores], dtype=np.int64),
        "first": np.array([request.first for request in scores], dtype=np.int64),
    }
    save_file(arrays, str(partial))
    partial.replace(path)


def _load(path: Path) -> list[RequestScores]:
    stored = load_file(str(path))
    parts = np.split(stored["scores"], np.cumsum(stored["lengths"])[:-1])
    return [
        RequestScores(scores, int(first), before)
        for before, scores, first in zip(parts[::2], parts[1::2], stored["first"], strict=True)
    ]
