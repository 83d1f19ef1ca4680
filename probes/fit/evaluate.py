"""The report on a finished detector: each figure beside those of baselines that do not look inside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.card import Calibration
from probes.fit.baselines import TextBaseline, length_score, question_mark_score
from probes.fit.example import Example
from probes.fit.linear_probe import Labels
from probes.fit.measure import Quality, auroc, measure, positive_value

__all__ = ["ControlProbes", "TestSet", "at_threshold", "compare", "labels_of", "verdict"]

Float64 = npt.NDArray[np.float64]

_PREVALENCES = (0.01, 0.001)
_BAND = (2.5, 97.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlProbes:
    """Scores of probes that cannot know anything, one array per probe.

    Attributes:
        shuffled: fitted on permuted labels.
        random: random directions.
    """

    shuffled: Sequence[Float64] = ()
    random: Sequence[Float64] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TestSet:
    """Rows with the detector's statistics.

    Attributes:
        examples: both labels.
        scores: (n,), the detector's.
        text_scores: (n,), the text baseline's.
        controls: scores of probes that cannot know anything.
    """

    examples: Sequence[Example]
    scores: Float64
    text_scores: Float64
    controls: ControlProbes


def labels_of(examples: Sequence[Example]) -> Labels:
    """(n,) 0 or 1."""
    return np.array([example.label for example in examples], dtype=np.int64)


def compare(tested: TestSet, *, seed: int) -> dict[str, Any]:
    """AUROC and TPR at 1 % FPR, each with its 95 % interval, of the detector and of every baseline.

    Length and question mark are reported in the direction that suits them better on these very rows; shuffled labels
    and random directions as median and 95 % band over many draws.
    """
    labels = labels_of(tested.examples)
    texts = [example.text for example in tested.examples]
    report: dict[str, Any] = {
        "num_positive": int(labels.sum()),
        "num_negative": int(labels.size - labels.sum()),
        "probe": measure(tested.scores, labels, seed=seed).report(),
        "tf_idf": measure(tested.text_scores, labels, seed=seed).report(),
        "length_only": _better_direction(length_score(texts), labels, seed).report(),
        "question_mark_only": _better_direction(question_mark_score(texts), labels, seed).report(),
    }
    for name, draws in (("shuffled_labels", tested.controls.shuffled), ("random_direction", tested.controls.random)):
        if draws:
            found = np.array([auroc(scores, labels) for scores in draws])
            low, high = np.percentile(found, _BAND)
            report[name] = {"auroc": [round(float(value), 3) for value in (np.median(found), low, high)]}
    return report


def at_threshold(calibration: Calibration, sets: Mapping[str, tuple[Float64, Labels]]) -> dict[str, Any]:
    """What the threshold does on each set: how many rows of how many fire, by label, and what an alarm is worth."""
    report: dict[str, Any] = {"threshold": round(calibration.threshold, 4), "target_fpr": calibration.target_fpr}
    for name, (scores, labels) in sets.items():
        fired = scores > calibration.threshold
        counts = {}
        for label, word in ((1, "positive"), (0, "negative")):
            rows = labels == label
            if rows.any():
                counts[f"fired_{word}"] = [int(fired[rows].sum()), int(rows.sum())]
        report[name] = counts
        if (labels == 1).any():
            caught = float(fired[labels == 1].mean())
            report[name]["precision_at_prevalence"] = {
                str(share): round(positive_value(caught, calibration.target_fpr, share), 4) for share in _PREVALENCES
            }
    return report


def verdict(quality: Quality, text_quality: Quality) -> str:
    """``ship``: surely above the text baseline; ``assist``: surely above chance; ``reject``: neither."""
    if quality.auroc.low > text_quality.auroc.value:
        return "ship"
    return "assist" if quality.auroc.low > 0.5 else "reject"  # noqa: PLR2004 - chance


def text_baseline_scores(train: Sequence[Example], tested: Sequence[Example]) -> Float64:
    """The text baseline, trained on the same rows as the probe."""
    baseline = TextBaseline([example.text for example in train], labels_of(train))
    return baseline.score([example.text for example in tested])


def _better_direction(scores: Float64, labels: Labels, seed: int) -> Quality:
    return measure(scores if auroc(scores, labels) >= 0.5 else -scores, labels, seed=seed)  # noqa: PLR2004 - chance
