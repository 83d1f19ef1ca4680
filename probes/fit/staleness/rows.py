"""Requests on which a detector is checked, and what it says of them on one build of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact
from probes.card import Calibration, Format, Stage
from probes.detectors import load_detector
from probes.errors import TelltaleError
from probes.fit.reading.rendered import Rendered
from probes.fit.reading.scores import ActivationSource, score_requests, statistics_of_requests
from probes.fit.rows.example import Example
from probes.fit.sources.jsonl import read_jsonl
from probes.fit.staleness.comparison import UNLABELLED
from probes.fit.staleness.decision import Claim
from probes.speaker import Speaker

__all__ = ["BuildReader", "Readings", "Rows", "StalenessError", "read_build", "read_rows"]

_DIGEST_CHARACTERS = 16


class StalenessError(TelltaleError, ValueError):
    """A detector cannot be checked, repaired or taken over."""


class BuildReader(ActivationSource, Protocol):
    """One build of a model: its tokens, and its activations, whatever computes them."""

    def render(
        self, examples: Sequence[Example], *, text_format: Format, stage: Stage, segments: Collection[Speaker] = ()
    ) -> list[Rendered]:
        """What the server reads of each example at a stage."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Requests, in the order of their file.

    Attributes:
        examples: n requests; of those without a label the example's own says nothing.
        labels: (n,): 1, 0 or ``UNLABELLED``.
        groups: (n,), numbered in the order in which they first appear.
    """

    examples: tuple[Example, ...]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]

    def digest(self) -> str:
        """SHA-256 over texts, labels and groups, in their order: rows are compared one by one."""
        digest = hashlib.sha256()
        for example, label, group in zip(self.examples, self.labels.tolist(), self.groups.tolist(), strict=True):
            digest.update(json.dumps([example.messages, example.response, label, group]).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What a detector says of requests on one build.

    Attributes:
        statistics: (n,) float64; minus infinity where the aggregate is not defined.
        fired: (n,): whether it lies above the threshold for such a request.
        tokens: n short digests of the tokens that reached the model.
    """

    statistics: npt.NDArray[np.float64]
    fired: npt.NDArray[np.bool_]
    tokens: tuple[str, ...]


def read_rows(path: Path) -> Rows:
    """Read a JSONL file as ``probes.fit.sources.jsonl`` does; labels are optional.

    Raises:
        probes.fit.sources.SourceError: the file cannot be read, or a line is wrong.
        StalenessError: it has no rows.
    """
    examples = tuple(read_jsonl(path, label=0))
    if not examples:
        raise StalenessError(f"{path}: holds no rows. A row is {json.dumps({'text': '...', 'label': 0})}.")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    given = [json.loads(line).get("label") for line in lines]
    numbers: dict[str, int] = {}
    return Rows(
        examples=examples,
        labels=np.array([UNLABELLED if label is None else label for label in given], dtype=np.int64),
        groups=np.array([numbers.setdefault(example.group, len(numbers)) for example in examples], dtype=np.int64),
    )


def read_build(
    artifact: Artifact, examples: Sequence[Example], reader: BuildReader, calibration: Calibration, *, label: str
) -> Readings:
    """Score requests on a build that need not be the one on the card.

    Args:
        artifact: of the detector.
        examples: requests.
        reader: of the build.
        calibration: says stage, format and aggregate.
        label: which build it is, for progress.
    Raises:
        probes.fit.reading.rendered.RenderError: an example has nothing to read at the stage.
        probes.fit.reading.scores.ScoreError: a score is NaN or infinite.
    """
    requests = reader.render(
        examples, text_format=calibration.format, stage=calibration.stage, segments=artifact.card.segments
    )
    (scores,) = score_requests(
        [load_detector(artifact)], requests, reader, skip_first=[artifact.card.skip_first], label=label
    )
    statistics = statistics_of_requests(calibration.aggregate, calibration.stage, scores)
    lengths = np.array([len(request.scores) for request in scores], dtype=np.int64)
    return Readings(
        statistics=statistics,
        fired=Claim.of(calibration).fires(statistics, lengths),
        tokens=tuple(_short_digest(request.tokens) for request in requests),
    )


def _short_digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:_DIGEST_CHARACTERS]
