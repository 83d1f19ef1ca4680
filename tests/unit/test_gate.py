"""`telltale gate` from end to end on a tiny random model and new builds of it: verdicts, repair, adoption."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from probes.artifact import Artifact, save_artifact, write_card
from probes.card import Format, LengthBucket
from probes.fit.staleness.check import CheckReport
from probes.fit.staleness.decision import Verdict
from probes.fit.staleness.reference import Reference
from serving.bench.rebuilds import rebuild, rotated, rounded
from tests.support.rebuilt import retemplated, shifted
from tests.unit.gate_case import (
    LAYER,
    Known,
    build,
    changed_words,
    checked,
    examples,
    make_known,
    run,
    written,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="module")
def known(home: Path) -> Known:
    return make_known(home)


@pytest.fixture(scope="module")
def turned(home: Path, known: Known) -> Path:
    return rebuild(known.model, home / "turned", rotated(0))


def test_a_reference_holds_numbers_and_no_texts(known: Known) -> None:
    found = Reference.read(known.reference)
    assert len(found.statistics) == len(known.data.read_text().splitlines()) == 900
    assert found.quality.ranking is not None
    assert 0.9 < found.quality.ranking.auroc_before < 0.9999
    assert not any(word in known.reference.read_text() for word in ("bake", "bread", "party"))


def test_an_unchanged_model_passes(tmp_path: Path, known: Known) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(known.model, copy)
    report = checked(tmp_path, copy, known, 0)
    assert report.decision.verdict is Verdict.PASS
    assert not report.changes
    assert report.comparison.agreement.identical == 900
    assert report.tokens_changed == 0


def test_rounded_weights_pass(tmp_path: Path, known: Known) -> None:
    report = checked(tmp_path, build(tmp_path, known.model, rounded), known, 0)
    assert changed_words(report) == {"weights"}
    assert report.comparison.ranking is not None
    assert abs(report.comparison.ranking.loss.value) < 0.02
    assert report.comparison.agreement.identical < 900


def test_a_shift_along_the_direction_is_stale(tmp_path: Path, known: Known) -> None:
    tensors = Artifact.load(known.detector).tensors
    direction = np.asarray(tensors["direction"] / tensors["scale"], dtype=np.float64)
    for number, size in enumerate((0.02, -0.02)):
        folder = tmp_path / str(number)
        folder.mkdir()
        report = checked(folder, build(folder, known.model, shifted(direction, size)), known, 10)
        assert report.decision.verdict is Verdict.STALE
        assert report.comparison.ranking is not None
        assert report.comparison.ranking.loss.high < 0.02
        mean_shift = report.comparison.agreement.mean_shift
        assert mean_shift is not None
        assert mean_shift * size > 0


def test_the_turned_build_computes_what_the_old_one_did(known: Known, turned: Path) -> None:
    """Else the planted truth below would be none."""
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 20)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)(tokens).logits
        for folder in (known.model, turned)
    ]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert logits[0].std() > 0.01


def test_a_turned_stream_is_degraded_and_the_repair_brings_it_back(tmp_path: Path, turned: Path, known: Known) -> None:
    report = checked(tmp_path, turned, known, 11)
    assert report.decision.verdict is Verdict.DEGRADED
    lost = report.comparison.ranking
    assert lost is not None
    assert abs(lost.auroc_after - 0.5) < 0.2

    texts = written(tmp_path / "texts.jsonl", examples(400, 4, 0.1), labels=False)
    out = tmp_path / "repaired"
    run("repair", known.detector, "--old", known.model, "--model", turned, "--data", texts, "--out", out)
    old, new = Artifact.load(known.detector), Artifact.load(out / known.detector.name)
    record = new.card.training["realigned"]
    assert new.card.model.weight_digest != old.card.model.weight_digest
    assert new.card.calibrations == ()
    assert new.card.canary is None
    assert new.card.training["data_digests"] == {"train": "d" * 64}
    assert record["from"]["tensors_digest"] == old.card.tensors_digest
    assert record["r2_score"] > 0.99
    assert record["r2_activations"] == {f"resid_post.{LAYER}": pytest.approx(1.0, abs=0.01)}
    assert list(record["r2_statistics"].values()) == [pytest.approx(1.0, abs=0.01)]

    # At least 90 % of what was lost, measured with the old threshold on the new build: scores are what they were.
    given = old.card.model_copy(
        update={"model": new.card.model, "tensors_digest": new.card.tensors_digest, "canary": None}
    )
    write_card(out / known.detector.name, given)
    again = tmp_path / "again.json"
    run("record", out / known.detector.name, "--data", known.data, "--model", turned, "--out", again)
    quality = Reference.read(again).quality.ranking
    assert quality is not None
    assert quality.auroc_before - lost.auroc_after >= 0.9 * (lost.auroc_before - lost.auroc_after)
    before, after = Reference.read(known.reference).statistics, Reference.read(again).statistics
    np.testing.assert_allclose(np.array(before), np.array(after), atol=0.05 * np.std(np.array(before)))


def test_another_template_is_named_and_judged_on_its_merits(tmp_path: Path, known: Known) -> None:
    """A word that the system prompt lacks changes every request's tokens, and little of what the detector says."""
    other = retemplated(known.model, tmp_path / "other", "you are a helper .", "you are helper .")
    said = run("check", known.detector, "--reference", known.reference, "--data", known.data, "--model", other,
               "--out", tmp_path / "r.json", code=0)  # fmt: skip
    report = CheckReport.read(tmp_path / "r.json")
    assert changed_words(report) == {"chat template"}
    assert report.tokens_changed == 900
    assert "900 of 900 requests reach the model as other tokens" in said
    # One that says the trigger itself to every request is another matter.
    worse = retemplated(known.model, tmp_path / "worse", "answer :", "steal answer :")
    assert checked(tmp_path, worse, known, 10).decision.verdict is Verdict.STALE


def test_too_few_rows_are_inconclusive(tmp_path: Path, known: Known) -> None:
    few = written(tmp_path / "few.jsonl", examples(60, 5, 0.5))
    out = tmp_path / "reference.json"
    said = run("record", known.detector, "--data", few, "--model", known.model, "--out", out)
    assert "even an unchanged build would be INCONCLUSIVE" in said
    report = checked(tmp_path, known.model, Known(known.model, known.detector, few, out), 12)
    assert any("299" in need for need in report.decision.needs)


def test_rows_without_labels_pass_where_requests_are_ordered_alike(tmp_path: Path, known: Known) -> None:
    lines = written(tmp_path / "a.jsonl", examples(500, 6, 0.0)).read_text()
    lines += written(tmp_path / "b.jsonl", examples(200, 7, 0.2), labels=False).read_text()
    (tmp_path / "rows.jsonl").write_text(lines)
    out = tmp_path / "reference.json"
    run(
        "record",
        known.detector,
        "--data",
        tmp_path / "rows.jsonl",
        "--model",
        known.model,
        "--out",
        out,
        "--format",
        "raw",
    )
    assert Reference.read(out).labels.count(None) == 200
    mixed = Known(known.model, known.detector, tmp_path / "rows.jsonl", out)
    report = checked(tmp_path, build(tmp_path, known.model, rounded), mixed, 0)
    assert report.comparison.ranking is None
    assert report.format is Format.RAW


def test_thresholds_by_length_are_those_that_act(tmp_path: Path, known: Known) -> None:
    """Every request is longer than five tokens: the threshold of the second bucket counts."""
    old = Artifact.load(known.detector)
    calibration = old.card.calibrations[0]
    alarms = []
    for number, limits in enumerate([(1e9, calibration.threshold), (calibration.threshold, 1e9)]):
        buckets = tuple(
            LengthBucket(
                max_tokens=end, threshold=limit, num_benign=1000, certified=True, top_scores=calibration.top_scores
            )
            for end, limit in zip((5, None), limits, strict=True)
        )
        card = old.card.model_copy(update={"calibrations": (calibration.model_copy(update={"buckets": buckets}),)})
        path, out = tmp_path / f"steal{number}.safetensors", tmp_path / f"{number}.json"
        save_artifact(path, card, old.tensors)
        run("record", path, "--data", known.data, "--model", known.model, "--out", out)
        found = Reference.read(out)
        assert found.quality.positive is not None
        alarms.append(found.quality.positive.caught_before)
        assert sum(found.fired) == alarms[-1] + (found.quality.benign.alarms_before if found.quality.benign else 0)
    plain = Reference.read(known.reference).quality.positive
    assert plain is not None
    assert alarms == [plain.caught_before, 0]
    assert plain.caught_before > 0
