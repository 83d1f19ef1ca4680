"""Do labels foretell activity beyond what selection alone would give? All latents, and three controls beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array

from probes.sae.describe.description import ControlFigures
from probes.sae.describe.token_label import LabelMaker, TokenLabel

__all__ = ["SELECTED", "LabelTest", "run_label_test"]

SELECTED = 50
"""Features whose held-out scores are told, those whose label scored best where it was made."""
_GOOD = 0.7

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LabelTest:
    """Labels and how good they are.

    Attributes:
        labels: of each latent.
        best: latents with a score, best on the half that the labels were made on first.
        figures: of the SAE's own labels, and of the controls.
    """

    labels: tuple[TokenLabel, ...]
    best: tuple[int, ...]
    figures: tuple[ControlFigures, ...]


def run_label_test(maker: LabelMaker, latents: csc_array, random_directions: csc_array, *, seed: int) -> LabelTest:
    """Label all latents, and take three controls through the same making, selection and measuring.

    * ``another latent's label``: each label is held against the activity of a random other latent.
    * ``shifted activity``: each latent's activity is moved to other tokens before its label is made.
    * ``random directions``: labels of random directions that are active as often as the latents. They answer another
      question: not whether the labels say something, but whether the SAE's features are easier to tell than any.

    Args:
        maker: of the corpus.
        latents: (rows, width) codes, sparse by latents.
        random_directions: the same of random directions.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    active = _columns(latents)
    labels = [maker.label(rows) for rows in active]
    scored = [number for number, label in enumerate(labels) if label.score is not None]
    best = sorted(scored, key=lambda number: (-_made_on(labels[number]), number))
    shifted = [maker.label(maker.shifted(rows, generator)) for rows in active if len(rows)]
    figures = (
        _figures("the SAE's latents", _pairs(labels)),
        _figures("another latent's label", _exchanged(maker, labels, active, scored, generator)),
        _figures("shifted activity", _pairs(shifted)),
        _figures("random directions", _pairs([maker.label(rows) for rows in _columns(random_directions)])),
    )
    return LabelTest(tuple(labels), tuple(best), figures)


def _columns(codes: csc_array) -> list[Indices]:
    return [
        codes.indices[start:end].astype(np.int64)
        for start, end in zip(codes.indptr[:-1], codes.indptr[1:], strict=True)
    ]


def _made_on(label: TokenLabel) -> float:
    return label.score.made_on if label.score else 0.0


def _pairs(labels: Sequence[TokenLabel]) -> list[tuple[float, float]]:
    return [(label.score.made_on, label.score.held_out) for label in labels if label.score]


def _exchanged(
    maker: LabelMaker,
    labels: Sequence[TokenLabel],
    active: Sequence[Indices],
    scored: Sequence[int],
    generator: np.random.Generator,
) -> list[tuple[float, float]]:
    """Each scored latent with the label of the next one in a random order: nobody keeps their own."""
    if len(scored) < 2:  # noqa: PLR2004 - an exchange takes two
        return []
    order = generator.permutation(scored)
    found = []
    for number, other in zip(order, np.roll(order, 1), strict=True):
        label = labels[other].tokens
        found.append((maker.made_on_score(label, active[number]), maker.held_out_score(label, active[number])))
    return found


def _figures(name: str, scores: Sequence[tuple[float, float]]) -> ControlFigures:
    """Of (score where the label was made, held-out score)."""
    chosen = sorted(scores, reverse=True)[:SELECTED]
    held_out = np.array([score for _, score in chosen])
    every = np.array([score for _, score in scores])
    return ControlFigures(
        name=name,
        scored=len(scores),
        selected=len(chosen),
        mean=round(float(held_out.mean()), 4) if len(chosen) else None,
        median=round(float(np.median(held_out)), 4) if len(chosen) else None,
        at_least_0_7=int((held_out >= _GOOD).sum()),
        median_of_all=round(float(np.median(every)), 4) if len(scores) else None,
    )
