"""What a probe has to beat: text classifiers, length, punctuation, and probes that cannot know anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from probes.fit.evaluation.controls import Control
from probes.fit.fitters import Fitter
from probes.fit.rows.example import Example
from probes.fit.training.linear_probe import Floats, Labels, LinearProbe

__all__ = [
    "EmbeddingPeer",
    "TextBaseline",
    "TextEncoder",
    "TextPeer",
    "TfIdfPeer",
    "labels_of",
    "length_score",
    "question_mark_score",
    "random_probes",
    "shuffled_probes",
    "whole_text",
]

Float64 = npt.NDArray[np.float64]

_TEXT_INVERSE_PENALTY = 10.0
_EMBEDDING_INVERSE_PENALTY = 0.1
_MAX_ITERATIONS = 1000


class TextPeer(Protocol):
    """A classifier that reads the text alone, trained on the rows that the detector was trained on."""

    @property
    def control(self) -> Control:
        """What it is called."""
        ...

    def scores(self, train: Sequence[Example], tested: Sequence[Example]) -> Float64:
        """Train on some rows, score others: (tested,)."""
        ...


class TextEncoder(Protocol):
    """Turns a text into a vector without looking at the served model's activations."""

    @property
    def control(self) -> Control:
        """What a classifier on its vectors is called."""
        ...

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(texts, width)."""
        ...


class TextBaseline:
    """TF-IDF over words (1-2) and characters (3-5) with logistic regression: the strong and cheap text-only peer.

    Args:
        texts: training rows.
        labels: (n,).
    """

    def __init__(self, texts: Sequence[str], labels: Labels) -> None:
        features = FeatureUnion(
            [
                ("words", TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)),
                ("characters", TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)),
            ]
        )
        classifier = LogisticRegression(
            C=_TEXT_INVERSE_PENALTY, class_weight="balanced", max_iter=_MAX_ITERATIONS, solver="liblinear"
        )
        self._pipeline = Pipeline([("features", features), ("classifier", classifier)])
        self._pipeline.fit(list(texts), labels)

    def score(self, texts: Sequence[str]) -> Float64:
        """(n,), in logits."""
        scores: Float64 = np.asarray(self._pipeline.decision_function(list(texts)), dtype=np.float64)
        return scores


class TfIdfPeer:
    """``TextBaseline``, trained anew for each question."""

    control = Control.TF_IDF

    def scores(self, train: Sequence[Example], tested: Sequence[Example]) -> Float64:
        """See ``TextPeer.scores``."""
        baseline = TextBaseline([whole_text(example) for example in train], labels_of(train))
        return baseline.score([whole_text(example) for example in tested])


class EmbeddingPeer:
    """Logistic regression on standardised embeddings; each text is encoded once.

    Args:
        encoder: of the texts.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._known: dict[str, npt.NDArray[np.float32]] = {}

    @property
    def control(self) -> Control:
        """The encoder's."""
        return self._encoder.control

    def scores(self, train: Sequence[Example], tested: Sequence[Example]) -> Float64:
        """See ``TextPeer.scores``."""
        classifier = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=_EMBEDDING_INVERSE_PENALTY, class_weight="balanced", max_iter=_MAX_ITERATIONS),
        )
        classifier.fit(self._encoded(train), labels_of(train))
        found: Float64 = np.asarray(classifier.decision_function(self._encoded(tested)), dtype=np.float64)
        return found

    def _encoded(self, examples: Sequence[Example]) -> npt.NDArray[np.float32]:
        texts = [whole_text(example) for example in examples]
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known |= dict(zip(new, self._encoder.encode(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def labels_of(examples: Sequence[Example]) -> Labels:
    """(n,) 0 or 1."""
    return np.array([example.label for example in examples], dtype=np.int64)


def whole_text(example: Example) -> str:
    """Everything that a reader of the request sees: all messages, and the reply if there is one."""
    parts = [message["content"] for message in example.messages]
    return "\n".join([*parts, example.response] if example.response else parts)


def length_score(texts: Sequence[str]) -> Float64:
    """Characters."""
    return np.array([len(text) for text in texts], dtype=np.float64)


def question_mark_score(texts: Sequence[str]) -> Float64:
    """1 where the text ends with a question mark."""
    return np.array([float(text.rstrip().endswith("?")) for text in texts], dtype=np.float64)


def shuffled_probes(
    features: Floats, labels: Labels, *, fitter: Fitter, count: int, generator: np.random.Generator
) -> list[LinearProbe]:
    """Probes fitted on the same rows with the labels permuted: what the procedure finds where there is nothing."""
    return [fitter.fit(features, generator.permutation(labels)) for _ in range(count)]


def random_probes(probe: LinearProbe, *, count: int, generator: np.random.Generator) -> list[LinearProbe]:
    """Random directions in the probe's standardised space."""
    size = probe.direction.size
    return [
        LinearProbe(generator.standard_normal(size).astype(np.float32), probe.mean, probe.scale, 0.0)
        for _ in range(count)
    ]
