"""Parts of a set: every row stands in one part of each key, and each part is measured as it says."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from probes.fit.evaluation.evaluate import ScoredRows, report_slices
from probes.fit.rows.example import Example
from probes.fit.rows.slices import SliceKey, length_bucket, slices


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(0, "1-16"), (1, "1-16"), (16, "1-16"), (17, "17-32"), (32, "17-32"), (33, "33-64"), (5000, "4097-8192")],
)
def test_buckets_double(length: int, bucket: str) -> None:
    assert length_bucket(length) == bucket


def rows() -> list[Example]:
    """Two sources with one label each and one with both; three roles; a language that is not always given."""
    found = []
    for i in range(120):
        source, label = (("harm", 1), ("benign", 0), ("both", i % 2))[i % 3]
        turns = (("user", "x"), ("tool", "y")) if i % 4 == 0 else ()
        found.append(
            Example(
                text="y",
                label=label,
                source=source,
                group=str(i),
                turns=turns,
                response="z" if i % 5 == 0 else "",
                language="" if i % 2 else "de",
            )
        )
    return found


def test_every_row_stands_in_one_part_of_each_key() -> None:
    examples = rows()
    lengths = [10 + 7 * (i % 9) for i in range(120)]
    found = list(slices(examples, lengths))
    for key in SliceKey:
        parts = [part.rows for part in found if part.key is key]
        assert sorted(np.concatenate(parts).tolist()) == list(range(120))
    values = {key: [part.value for part in found if part.key is key] for key in SliceKey}
    assert values[SliceKey.SOURCE] == ["benign", "both", "harm"]
    assert values[SliceKey.ROLE] == ["assistant", "tool", "user"]
    assert values[SliceKey.LANGUAGE] == ["de", "not given"]
    assert values[SliceKey.LENGTH] == ["1-16", "17-32", "33-64", "65-128"]
    for part in found:
        if part.key is SliceKey.ROLE and part.value == "assistant":
            assert all(examples[i].response for i in part.rows)
    # A key with one value alone says nothing.
    same = [Example(text="a", label=i % 2, source="s", group=str(i)) for i in range(8)]
    assert list(slices(same, [5] * 8)) == []


def test_a_part_with_one_label_is_held_against_all_rows_of_the_other() -> None:
    examples = rows()
    labels = np.array([row.label for row in examples])
    scores = np.random.default_rng(0).standard_normal(120) + labels
    limits = np.where(np.arange(120) % 2, 0.5, 5.0)
    reports = report_slices(ScoredRows(examples=examples, scores=scores), [5] * 120, limits=limits, seed=0)
    found = {report.value: report for report in reports if report.key is SliceKey.SOURCE}
    sources = np.array([row.source for row in examples])
    for name, against in (("harm", labels == 0), ("benign", labels == 1), ("both", sources == "both")):
        part = (sources == name) | against
        estimate = found[name].auroc
        assert estimate is not None
        assert estimate.value == pytest.approx(roc_auc_score(labels[part], scores[part]))
        assert estimate.low <= estimate.value <= estimate.high
    assert found["benign"].caught is None
    assert found["harm"].false_alarms is None
    share = found["both"].caught
    assert share is not None
    own = (sources == "both") & (labels == 1)
    assert (share.count, share.of) == (int((scores > limits)[own].sum()), int(own.sum()))
    # Nine rows of a label tell nothing of an area.
    few = [*examples[:9], *(Example(text="y", label=0, source="t", group=f"t{i}") for i in range(9))]
    reports = report_slices(ScoredRows(examples=few, scores=scores[:18]), [5] * 18, limits=limits[:18], seed=0)
    assert [report.auroc for report in reports if report.value == "t"] == [None]
