"""Sets that pass on the rows of others: as harmless ones, and those that a list names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from probes.errors import TelltaleError
from probes.fit.rows.dataset import Dataset, build_dataset
from probes.fit.rows.example import Example, text_digest
from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import SourceContext, SourceError, parse_source
from probes.fit.training.recipe import read_recipe

OWN = {"kind": "jsonl", "path": "rows.jsonl"}


def context_in(folder: Path, seed: int = 0) -> SourceContext:
    return SourceContext(wheels=WheelStore(folder=folder, progress=lambda _: None), folder=folder, seed=seed)


def rows_of(config: dict[str, Any], folder: Path, seed: int = 0) -> list[Example]:
    return parse_source(config).load(context_in(folder, seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [
        {"text": f"{'Steal' if label else 'Bake'} number {i} {j}", "label": label, "group": f"g{i}", "source": "own"}
        for i in range(60)
        for j in range(2)
        for label in (0, 1)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_rows_of_all_labels_become_harmless(folder: Path) -> None:
    plain = rows_of(OWN, folder)
    rows = rows_of({"kind": "harmless", "of": [OWN]}, folder)
    assert [(row.text, row.group, row.source) for row in rows] == [(row.text, row.group, row.source) for row in plain]
    assert {row.label for row in rows} == {0}
    kept = rows_of({"kind": "harmless", "of": [OWN], "labels": [1]}, folder)
    assert {row.text for row in kept} == {row.text for row in plain if row.label == 1}


def test_no_group_stands_in_both_parts_whatever_the_seed(folder: Path) -> None:
    parts = {
        (part, seed): {row.group for row in rows_of({"kind": "harmless", "of": [OWN], "part": part}, folder, seed)}
        for part in ("training", "checking")
        for seed in (0, 1)
    }
    assert parts["training", 0] == parts["training", 1]
    assert not parts["training", 0] & parts["checking", 1]
    assert parts["training", 0] | parts["checking", 0] == {row.group for row in rows_of(OWN, folder)}
    assert 15 < len(parts["training", 0]) < 45


def listed(folder: Path, *texts: str) -> list[Example]:
    digests = [text_digest(text) for text in texts]
    (folder / "list.txt").write_text("\n".join(["# what it is", *digests]) + "\n", encoding="ascii")
    return rows_of({"kind": "listed", "of": [OWN], "digests": "list.txt"}, folder)


def test_a_list_takes_its_rows_with_their_labels_and_no_others(folder: Path) -> None:
    rows = listed(folder, "steal NUMBER 3, 1!", "Bake number 59 0")
    assert [(row.text, row.label) for row in rows] == [("Steal number 3 1", 1), ("Bake number 59 0", 0)]


def test_a_list_whose_rows_are_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"1 of 2 rows are in none of the sets"):
        listed(folder, "Steal number 3 1", "never written")
    with pytest.raises(SourceError, match="cannot be read"):
        rows_of({"kind": "listed", "of": [OWN], "digests": "missing.txt"}, folder)


@pytest.mark.parametrize("of", [[], "jsonl", [{"kind": "jsonk", "path": "x"}]])
def test_sets_that_are_none(of: object) -> None:
    with pytest.raises((TelltaleError, ValidationError)):
        parse_source({"kind": "harmless", "of": of})


RECIPE = """
version: "1"
name: stealing
description: Mentions stealing.
seed: 1
training:
  positives: [{kind: jsonl, path: rows.jsonl}]
  negatives: [{kind: jsonl, path: rows.jsonl}]
  small_talk: 1.0
  small_talk_of: [{kind: harmless, of: [{kind: jsonl, path: rows.jsonl}], labels: [0]}]
search:
  layers: [1]
  aggregates: [{kind: mean}]
  fitters: [{kind: logistic, inverse_penalty: 0.1}]
calibration:
  held_out: 0.3
development:
  pairs: [{kind: listed, of: [{kind: jsonl, path: rows.jsonl}], digests: list.txt}]
  apart:
    again: [{kind: listed, of: [{kind: jsonl, path: rows.jsonl}], digests: list.txt}]
"""


def test_what_is_measured_is_in_no_other_use_nor_is_its_group(folder: Path) -> None:
    measured = listed(folder, *(f"{word} number {i} 0" for word in ("Steal", "Bake") for i in range(8)))
    (folder / "stealing.recipe.yaml").write_text(RECIPE)
    recipe = read_recipe(folder / "stealing.recipe.yaml")
    data: Dataset = build_dataset(recipe, context_in(folder, recipe.seed))
    assert {row.text for row in data.pairs} == {row.text for row in measured}
    assert {row.text for row in data.apart["again"]} == {row.text for row in measured}, "a row may stand in two sets"
    groups = {row.group for row in measured}
    assert len(groups) == 8
    assert not groups & {row.group for row in (*data.train, *data.calibration)}
    for row in (*data.train, *data.calibration):
        assert not any(text.text in row.text for text in measured), "neither as small talk"
