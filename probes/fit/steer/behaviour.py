"""The judge of a behaviour, from texts alone: it never sees an activation, so it cannot agree with a steer by birth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from scipy.special import expit
from sklearn.model_selection import GroupKFold

from probes.errors import TelltaleError
from probes.fit.evaluation.baselines import Float64, TextBaseline
from probes.fit.evaluation.measure import Estimate, measure
from probes.fit.rows.example import Example
from probes.fit.rows.json_lines import read_json_lines

__all__ = ["MIN_AUROC", "BehaviourError", "Judge", "read_examples"]

MIN_AUROC = 0.9
"""A judge below this cannot tell the behaviour, and nothing can be said of a steer by it."""
_FOLDS = 5
_MIN_GROUPS = 10
_FORM = '{"positive": "...", "negative": "..."} or {"text": "...", "label": 0 or 1}'


class BehaviourError(TelltaleError, ValueError):
    """Examples of a behaviour cannot be read, or are too few to judge by."""


class _Pair(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    positive: str = Field(min_length=1)
    negative: str = Field(min_length=1)

    def examples(self, where: str, group: str) -> list[Example]:
        return [
            Example(text=text, label=label, source=where, group=group)
            for label, text in ((1, self.positive), (0, self.negative))
        ]


class _Labelled(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: str = Field(min_length=1)
    label: int = Field(ge=0, le=1)
    group: str = ""

    def examples(self, where: str, group: str) -> list[Example]:
        return [Example(text=self.text, label=self.label, source=where, group=self.group or group)]


def read_examples(path: Path) -> list[Example]:
    """Labelled texts: contrast pairs, or ``{"text": "...", "label": 1}`` a line.

    Texts that belong together have the same ``group``. The two texts of a pair are one group.

    Raises:
        BehaviourError: the file cannot be read, a line is of neither form, or a label is missing altogether.
    """
    examples: list[Example] = []
    for item in read_json_lines(
        path, TypeAdapter[_Pair | _Labelled](_Pair | _Labelled), form=_FORM, error=BehaviourError
    ):
        examples.extend(item.line.examples(f"{path}:{item.number}", str(item.number)))
    groups = {example.group for example in examples}
    if {example.label for example in examples} != {0, 1} or len(groups) < _MIN_GROUPS:
        raise BehaviourError(
            f"{path}: {len(examples)} examples in {len(groups)} groups; texts of both labels in at least {_MIN_GROUPS} "
            "groups are needed to judge by. Write more."
        )
    return examples


@dataclass(frozen=True, slots=True)
class Judge:
    """TF-IDF over words and characters with logistic regression, and how well it tells the behaviour.

    Attributes:
        baseline: fitted on all examples.
        auroc: on examples of groups that it was not fitted on, by cross-validation.
        examples: how many.
        digest: SHA-256 over them.
        pairs_digest: as ``telltale vector`` writes it onto a direction's card, had these been its pairs.
    """

    baseline: TextBaseline
    auroc: Estimate
    examples: int
    digest: str
    pairs_digest: str

    @classmethod
    def fit(cls, examples: Sequence[Example], *, seed: int) -> Judge:
        """Learn from labelled texts.

        Args:
            examples: as ``read_examples`` gives them.
            seed: of the interval's resampling.
        """
        texts = [example.text for example in examples]
        labels = np.array([example.label for example in examples], dtype=np.int64)
        groups = [example.group for example in examples]
        held_out = np.empty(len(examples))
        for train, test in GroupKFold(_FOLDS).split(texts, labels, groups):
            if len(set(labels[train])) == 1:
                raise BehaviourError("one group holds all examples of a label: the judge cannot be tested on others.")
            held_out[test] = TextBaseline([texts[i] for i in train], labels[train]).score([texts[i] for i in test])
        content = json.dumps([[example.text, example.label] for example in examples])
        return cls(
            TextBaseline(texts, labels),
            measure(held_out, labels, seed=seed).auroc,
            len(examples),
            hashlib.sha256(content.encode()).hexdigest(),
            hashlib.sha256(json.dumps([texts[i : i + 2] for i in range(0, len(texts), 2)]).encode()).hexdigest(),
        )

    def __call__(self, texts: Sequence[str]) -> Float64:
        """P(behaviour) of each text: (n,) from 0 to 1."""
        chances: Float64 = expit(self.baseline.score(texts))
        return chances
