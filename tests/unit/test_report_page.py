"""The lint names each missing piece; the page needs nothing from elsewhere and lets no text become markup."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.aggregate.mean import Mean
from probes.card import Format, Platt, Stage
from probes.fit.evaluation.baselines import labels_of
from probes.fit.evaluation.controls import MODEL_CONTROLS, REQUIRED, Control
from probes.fit.evaluation.cross_source import FoldScores, leave_one_out
from probes.fit.evaluation.delay import detection_delay
from probes.fit.evaluation.evaluate import (
    ScoredRows,
    compare,
    histogram,
    limits_of,
    report_reliability,
    report_slices,
    report_threshold,
    trivial_in,
)
from probes.fit.evaluation.evaluation import (
    Absent,
    DataRef,
    DetectorRef,
    FormatReport,
    Report,
    Split,
    SplitPolicy,
    SweepPoint,
)
from probes.fit.evaluation.html_report import render_page
from probes.fit.evaluation.lint import ReportError, lint, read_report
from probes.fit.evaluation.resampling import RESAMPLES
from probes.fit.evaluation.weigh import Home, weigh
from probes.fit.rows.example import Example
from probes.fit.rows.split import Fold
from tests.unit.artifacts import DIGEST, calibration

HOSTILE = '</title><script>alert(\'x\')</script><img src="https://elsewhere.example/a.png" onerror="b()">'
TEXT = "a sentence that nobody may read in a report"
ROWS = 240


@pytest.fixture(scope="module")
def report() -> Report:
    """Of made-up statistics, with every part that a report may have; a source and a file have hostile names."""
    generator = np.random.default_rng(0)
    examples = [
        Example(
            text=f"{TEXT} {'x' * (i % 50)}{'?' if i % 7 == 0 else ''}",
            label=int(i % 2),
            source=HOSTILE if i % 4 < 2 else "tickets",
            group=f"g{i // 2}",
            language="en" if i % 3 else "de",
        )
        for i in range(ROWS)
    ]
    labels = labels_of(examples)

    def scores(gap: float) -> np.ndarray:
        return generator.standard_normal(ROWS) + gap * labels

    tested = ScoredRows(
        examples=examples,
        scores=scores(3.0),
        peers={
            Control.TF_IDF: scores(1.0),
            Control.BAG_OF_EMBEDDINGS: scores(0.8),
            Control.RANDOM_INIT: scores(0.3),
        },
        bands={control: [scores(0.0) for _ in range(20)] for control in MODEL_CONTROLS[:2]},
    )
    table = compare(tested, seed=0)
    folds = [
        FoldScores(
            fold=Fold(HOSTILE, tuple(range(120)), tuple(range(120, 240))),
            detector=tested.scores[120:],
            peers={Control.TF_IDF: tested.peers[Control.TF_IDF][120:]},
        )
    ]
    home = Home(leave_one_out=leave_one_out(examples, folds, seed=0), trivial=trivial_in(examples))
    lengths = [10 + i % 40 for i in range(ROWS)]
    chosen = calibration(aggregate=Mean(), threshold=1.5)
    platt = Platt(
        slope=1.5, intercept=-2.0, num_positive=9, num_negative=9, ece_before=0.1, ece_after=0.1, data_digest=DIGEST
    )
    found = FormatReport(
        aggregate=Mean(),
        table=table,
        threshold=report_threshold(chosen, tested.scores, labels, lengths),
        slices=report_slices(tested, lengths, limits=limits_of(chosen, lengths), seed=0),
        histogram=histogram(tested.scores, labels),
        reliability=report_reliability(platt, tested.scores, examples, seed=0),
        delay=detection_delay([1, 4, None], [0, 0, 0]),
        leave_one_out=home.leave_one_out,
        in_distribution=None,
        trivial_in_training=dict(home.trivial),
        verdict=weigh(table, SplitPolicy.HELD_OUT_SOURCES, home),
    )
    data = DataRef(file=f"{HOSTILE}.jsonl", digest=DIGEST, rows=ROWS, sources={HOSTILE: 120, "tickets": 120})
    return Report(
        detector=DetectorRef(
            name="stealing", kind="linear", tensors_digest=DIGEST, model_id=HOSTILE, weight_digest=DIGEST
        ),
        stage=Stage.PROMPT,
        data=data,
        training_data=data,
        split=Split(policy=SplitPolicy.HELD_OUT_SOURCES, removed=0),
        seed=0,
        resamples=RESAMPLES,
        refit="logistic",
        layer_sweep=tuple(SweepPoint(layer=i, aggregate="mean", fitter="f", auroc=0.7 + i / 100) for i in range(5)),
        formats={Format.CHAT: found, Format.RAW: found},
        verdict=found.verdict,
        created_by="telltale test",
    )


def written(report: Report, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(report.model_dump_json())
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_whole_report_passes_and_says_the_same_when_it_is_read(report: Report, tmp_path: Path) -> None:
    assert lint(report) == []
    path = tmp_path / "r.json"
    report.write(path)
    assert read_report(path) == report


def drop(*place: str | int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for part in place[:-1]:
            content = content[part]  # type: ignore[index]
        del content[place[-1]]  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("formats", "chat", "table", "num_negative"), "n: formats.chat.table.num_negative is missing"),
        (drop("formats", "raw", "table", "num_groups"), "n: formats.raw.table.num_groups"),
        (drop("data", "rows"), "n: data.rows"),
        (drop("formats", "chat", "table", "detector", "auroc", "low"), "intervals: .*detector.auroc.low"),
        (drop("formats", "chat", "table", "controls", 0, "auprc", "high"), "intervals: .*controls.0.auprc.high"),
        (drop("formats", "chat", "threshold", "caught", "low"), "intervals: .*threshold.caught.low"),
        (drop("formats", "chat", "table", "controls"), "controls: formats.chat.table.controls"),
        (drop("formats", "chat", "table", "detector"), "the detector's figures: "),
        (drop("split"), "split policy: split is missing"),
        (drop("split", "policy"), "split policy: split.policy is missing"),
        (drop("seed"), "seed is missing"),
        (drop("resamples"), "resamples is missing"),
        (drop("data", "digest"), "data.digest is missing"),
        (drop("detector", "tensors_digest"), "detector.tensors_digest is missing"),
    ],
)
def test_each_missing_piece_is_named(
    report: Report, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    with pytest.raises(ReportError, match=said):
        read_report(written(report, tmp_path / "r.json", change))


@pytest.mark.parametrize("names", REQUIRED, ids=lambda names: names[0].value)
def test_each_missing_control_is_named(report: Report, names: tuple[Control, ...]) -> None:
    def without(absent: tuple[Absent, ...]) -> Report:
        formats = {}
        for text_format, found in report.formats.items():
            kept = {
                "controls": tuple(row for row in found.table.controls if row.name not in names),
                "bands": tuple(band for band in found.table.bands if band.name not in names),
                "absent": absent,
            }
            formats[text_format] = found.model_copy(update={"table": found.table.model_copy(update=kept)})
        return report.model_copy(update={"formats": formats})

    told = " or ".join(name.value for name in names)
    findings = lint(without(()))
    assert findings == [f"{text_format}: controls: {told} is missing" for text_format in ("chat", "raw")]
    # A reason explains what is missing; it does not make it dispensable, unless it has no meaning for the kind.
    findings = lint(without((Absent(name=names[0], reason="nobody had time"),)))
    assert findings[0] == f"chat: controls: {told} is missing (nobody had time)"
    assert lint(without((Absent(name=names[0], reason="no such fit", applies=False),))) == []


def test_an_unchecked_split_and_a_rate_without_reason_are_named(report: Report, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["split"]["policy"] = "unchecked"
        content["formats"]["chat"]["table"]["detector"]["tpr"][0] |= {"tpr": None, "reason": ""}
        content["formats"]["raw"]["table"]["detector"]["tpr"] = []

    with pytest.raises(ReportError) as refused:
        read_report(written(report, tmp_path / "r.json", change))
    assert "split policy: nobody has checked" in str(refused.value)
    assert "chat: intervals: TPR at 0.05 of detector has neither a figure nor a reason" in str(refused.value)
    assert "raw: intervals: detector has no TPR" in str(refused.value)


def test_what_is_no_report_is_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        read_report(tmp_path / "none.json")
    with pytest.raises(ReportError, match=r"formats.chat.table.num_positive: .*greater than 0"):
        read_report(
            written(report, tmp_path / "r.json", lambda c: c["formats"]["chat"]["table"].update(num_positive=0))
        )
    with pytest.raises(ReportError, match="surplus: Extra inputs"):
        read_report(written(report, tmp_path / "r.json", lambda c: c.update(surplus=1)))


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, ids, and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_the_page_stands_alone(report: Report) -> None:
    text = render_page(report)
    page = Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "one id stands twice"
    referred: list[str] = []
    for _, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), f"{name}: a page without scripts has no handlers"
            assert name != "src"
            assert "//" not in value or HOSTILE in value, f"{name}={value!r} names an address"
            if name.endswith("href"):
                assert value.startswith("#")
                referred.append(value[1:])
            referred += [part.split(")")[0] for part in value.split("url(#")[1:]]
            referred += value.split() if name == "aria-labelledby" else []
    assert set(referred) <= set(ids)
    assert referred
    # Plots: ROC, statistics, false alarms and reliability in two formats, and the layers.
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(drawings) == 9
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 20 for attrs in drawings)
    assert page.count("figcaption") == 9
    assert page.count("table") == page.count("caption") >= 12
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    assert text == render_page(report)


def test_no_text_becomes_markup_and_no_row_is_shown(report: Report) -> None:
    text = render_page(report)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert HOSTILE in Page(text).text
    assert TEXT not in text
    for said in (report.verdict.grade.value, "not certifiable", "Detection delay", "1 in 1,000", DIGEST):
        assert said in text


def test_the_page_says_what_the_report_says(report: Report) -> None:
    page = Page(render_page(report)).text
    found = report.formats[Format.CHAT]
    for row in (found.table.detector, *found.table.controls):
        for estimate in (row.auroc, row.auprc):
            assert f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})" in page
    for part in found.slices:
        assert part.value in page
    for reason in found.verdict.reasons:
        assert reason in page
