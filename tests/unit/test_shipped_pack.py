"""What the cards of the shipped detectors say, and that it fits together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probes.packs
from probes.artifact import Artifact
from probes.card import Format
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.verdict import Grade
from probes.fit.training.recipe import read_recipe

PACK = Path(probes.packs.__file__).parent / "smollm2-135m-instruct"
ARTIFACTS = sorted(PACK.glob("*.safetensors"))
BESIDE = {
    Control.TF_IDF,
    Control.SENTENCE_EMBEDDING,
    Control.LENGTH_ONLY,
    Control.QUESTION_MARK_ONLY,
    Control.SHUFFLED_LABELS,
    Control.RANDOM_DIRECTION,
}


def tables(evaluation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the folds, and of the development pairs where there are any."""
    for of_format in evaluation["leave_one_source_out"].values():
        yield from of_format.values()
    for text_format in Format:
        yield from (table for name, table in evaluation[text_format].items() if name.startswith(("pairs", "against")))


@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.stem)
def test_every_table_has_every_control_beside_the_detector(path: Path) -> None:
    found = list(tables(Artifact.load(path).card.evaluation))
    assert len(found) >= 6
    for table in found:
        assert set(table) >= BESIDE
        low, point, high = (table["probe"]["auroc"][place] for place in (1, 0, 2))
        assert 0 <= low <= point <= high <= 1


@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.stem)
def test_both_formats_are_calibrated_with_what_drift_is_measured_against(path: Path) -> None:
    card = Artifact.load(path).card
    assert {item.format for item in card.calibrations} == set(card.formats) == set(Format)
    for item in card.calibrations:
        assert item.certified
        # All of one calibration: a threshold, its largest statistics and their quantiles.
        assert item.top_scores[0] == pytest.approx(item.quantiles[-1])
        assert np.interp(1 - item.target_fpr, np.linspace(0, 1, len(item.quantiles)), item.quantiles) <= item.threshold


@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.stem)
def test_the_recipe_beside_it_is_the_one_it_was_made_with(path: Path) -> None:
    card = Artifact.load(path).card
    assert card.training["recipe"] == read_recipe(path.with_suffix(".recipe.yaml")).model_dump(mode="json")
    assert {Grade(card.evaluation[text_format]["verdict"]) for text_format in Format} <= {Grade.SHIP, Grade.ASSIST}
