"""What a probe has to beat: text classifiers, length, punctuation, and probes that cannot know anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, Pipeline

from probes.fit.fitters import Fitter
from probes.fit.linear_probe import Floats, Labels, LinearProbe

__all__ = ["TextBaseline", "length_score", "question_mark_score", "random_probes", "shuffled_probes"]

Float64 = npt.NDArray[np.float64]

_TEXT_INVERSE_PENALTY = 10.0
_MAX_ITERATIONS = 1000


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
