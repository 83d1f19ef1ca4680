"""Repeats the making of a lens: of another model's unembedding. Neither rows nor labels take part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from probes.artifact import Artifact
from probes.fit.reading.token_rows import TokenRows
from probes.fit.refits.base import KindFit, RefitError, Tensors
from probes.fit.training.lens import lens_tensors
from probes.fit.training.linear_probe import Labels


class Lens(KindFit):
    """The same tokens against the same others.

    Args:
        tensors: of the detector's own model.
        tokens: ids of the first set.
        contrast: ids of the second.
    """

    kind = "lens"
    uses_labels = False
    reads_head = True

    def __init__(self, tensors: Tensors, tokens: Sequence[int], contrast: Sequence[int]) -> None:
        self._tensors, self._tokens, self._contrast = tensors, tokens, contrast

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """See ``KindFit.of``."""
        match artifact.card.training.get("ids"):
            case [[*tokens], [*contrast]]:
                return cls(artifact.tensors, [int(token) for token in tokens], [int(token) for token in contrast])
        raise RefitError("the card does not name the ids of its tokens")

    def fit(self, rows: TokenRows, labels: Labels, *, other_model: Path | None) -> Tensors:
        """See ``KindFit.fit``."""
        if other_model is None:
            return self._tensors
        return lens_tensors(other_model, self._tokens, self._contrast)

    def __str__(self) -> str:
        return "a lens is made of the unembedding: every fold is scored by the detector itself"
