"""`telltale gate` from end to end on a tiny random model and new builds of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from typer.testing import CliRunner

from probes.aggregate import Aggregator
from probes.aggregate.ema import Ema
from probes.artifact import Artifact, save_artifact, write_card
from probes.card import Format, LengthBucket, Stage
from probes.fit.activations import ActivationReader
from probes.fit.calibrate import calibrate
from probes.fit.canary import canary_of
from probes.fit.example import Example
from probes.fit.fitters.logistic import Logistic
from probes.fit.staleness.changes import installed_libraries, library_changes, model_changes
from probes.fit.staleness.check import CheckReport
from probes.fit.staleness.decision import Verdict
from probes.fit.staleness.reference import Reference
from probes.modelref import read_model_ref
from serving.bench.rebuilds import Change, rebuild, rotated, rounded
from serving.cli import app
from tests.support.rebuilt import retemplated, shifted
from tests.support.words import WORDS, make_word_model
from tests.unit.artifacts import make_card

LAYER = 1
AGGREGATE: Aggregator = Ema(alpha=0.3)
TARGET = 0.01


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="module")
def model_dir(home: Path) -> Path:
    return make_word_model(home / "model")


def examples(count: int, seed: int, positives: float) -> list[Example]:
    """Sentences of random words; a positive one has "steal" and "money" somewhere, about as often not at its end."""
    generator = np.random.default_rng(seed)
    plain = [word for word in dict.fromkeys(WORDS) if word not in {"steal", "money"}]
    made = []
    for number in range(count):
        words = [str(word) for word in generator.choice(plain, 10)]
        label = int(number < positives * count)
        if label:
            words[int(generator.integers(0, 10))] = "steal"
            words[int(generator.integers(0, 10))] = "money"
        made.append(Example(text=" ".join(words), label=label, source="words", group=f"{seed}/{number}"))
    return made


def reader_of(folder: Path, cache: Path) -> ActivationReader:
    model = read_model_ref(folder, model_id=folder.name, dtype="float32", cache_dir=cache)
    return ActivationReader(folder, model=model, layers=[LAYER], cache_dir=cache, progress=lambda _: None)


def written(path: Path, rows: list[Example], *, labels: bool = True) -> Path:
    lines = [{"text": row.text, "group": row.group, **({"label": row.label} if labels else {})} for row in rows]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


@pytest.fixture(scope="module")
def detector(home: Path, model_dir: Path) -> Path:
    """Logistic regression on what the aggregate makes of the stream, calibrated in both formats, with a canary."""
    reader = reader_of(model_dir, home)
    train, benign = examples(600, 1, 0.5), examples(1000, 2, 0.0)

    def means(rows: list[Example], text_format: Format) -> np.ndarray:
        found = reader.read(rows, text_format=text_format, aggregates=[AGGREGATE], skip_first=1, label="rows")
        return found.at(LAYER, AGGREGATE)

    features = np.concatenate([means(train, text_format) for text_format in Format])
    labels = np.tile([row.label for row in train], 2)
    probe = Logistic(inverse_penalty=1.0).fit(features, labels)
    calibrations = [
        calibrate(
            probe.score(means(benign, text_format)), benign, stage=Stage.PROMPT, text_format=text_format,
            aggregate=AGGREGATE, target_fpr=TARGET, confidence=0.95,
        )
        for text_format in Format
    ]  # fmt: skip
    card = make_card("steal", layers=(LAYER,), model=reader.model, calibrations=calibrations)
    card = card.model_copy(update={"training": {"data_digests": {"train": "d" * 64}}})
    path = home / "steal.safetensors"
    made = save_artifact(path, card, probe.tensors())
    canary = canary_of(made, model_dir=model_dir, progress=lambda _: None)
    write_card(path, made.card.model_copy(update={"canary": canary}))
    return path


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["gate", *map(str, words)])
    if result.exit_code != code and result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@dataclass(frozen=True)
class Known:
    """What was recorded: files."""

    model: Path
    detector: Path
    data: Path
    reference: Path


@pytest.fixture(scope="module")
def known(home: Path, detector: Path, model_dir: Path) -> Known:
    """900 rows, a quarter of them positive, on the model of the card."""
    data = written(home / "rows.jsonl", examples(900, 3, 0.25))
    out = home / "reference.json"
    said = run("record", detector, "--data", data, "--model", model_dir, "--out", out)
    assert "False alarms on 675 benign rows" in said
    assert "even an unchanged build" not in said
    return Known(model_dir, detector, data, out)


def checked(folder: Path, model: Path, known: Known, code: int) -> CheckReport:
    out = folder / "report.json"
    said = run(
        "check", known.detector, "--reference", known.reference, "--data", known.data, "--model", model,
        "--out", out, code=code,
    )  # fmt: skip
    report = CheckReport.read(out)
    assert f"{report.decision.verdict.value}: steal on " in said
    for reason in report.decision.reasons:
        assert reason in said
    return report


def build(folder: Path, model_dir: Path, change: Change) -> Path:
    return rebuild(model_dir, folder / "new", change)


def changed_words(report: CheckReport) -> set[str]:
    return {change.what for change in report.changes}


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


@pytest.fixture(scope="module")
def turned(home: Path, model_dir: Path) -> Path:
    return rebuild(model_dir, home / "turned", rotated(0))


def test_the_turned_build_computes_what_the_old_one_did(model_dir: Path, turned: Path) -> None:
    """Else the planted truth below would be none."""
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 20)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)(tokens).logits
        for folder in (model_dir, turned)
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


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, ["gate", *map(str, words)])
    assert result.exit_code != 0
    return f"{result.output} {result.exception}"


def test_another_artifact_threshold_or_data_set_is_refused(tmp_path: Path, known: Known) -> None:
    def check(artifact: Path, rows: Path) -> str:
        return refused("check", artifact, "--reference", known.reference, "--data", rows, "--model", known.model)

    lines = known.data.read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)))
    assert "not those of the reference" in check(known.detector, tmp_path / "turned.jsonl")
    (tmp_path / "short.jsonl").write_text("\n".join(lines[:-1]))
    assert "899 rows, recorded 900" in check(known.detector, tmp_path / "short.jsonl")
    relabelled = [lines[0].replace('"label": 1', '"label": 0'), *lines[1:]]
    (tmp_path / "relabelled.jsonl").write_text("\n".join(relabelled))
    assert "not those of the reference" in check(known.detector, tmp_path / "relabelled.jsonl")

    old = Artifact.load(known.detector)
    other = tmp_path / "steal.safetensors"
    save_artifact(other, old.card, {**old.tensors, "bias": old.tensors["bias"] + 1})
    assert "of another artifact" in check(other, known.data)
    moved = tuple(item.model_copy(update={"threshold": item.threshold + 1}) for item in old.card.calibrations)
    save_artifact(other, old.card.model_copy(update={"calibrations": moved}), old.tensors)
    assert "calibrated anew" in check(other, known.data)
    (tmp_path / "bad.json").write_text("{}")
    assert "record it again" in refused(
        "check", known.detector, "--reference", tmp_path / "bad.json", "--data", known.data, "--model", known.model
    )


def test_it_records_only_on_the_model_of_the_card(tmp_path: Path, turned: Path, known: Known) -> None:
    said = refused("record", known.detector, "--data", known.data, "--model", turned, "--out", tmp_path / "r.json")
    assert "does not fit" in said
    assert not (tmp_path / "r.json").exists()


def test_a_stage_without_a_threshold_is_refused(tmp_path: Path, known: Known) -> None:
    said = refused("record", known.detector, "--data", known.data, "--model", known.model, "--out", tmp_path / "r.json",
                   "--stage", "stream")  # fmt: skip
    assert "not calibrated" in said
    said = refused("record", known.detector, "--data", known.data, "--model", known.model, "--out", tmp_path / "r.json",
                   "--aggregate", "max")  # fmt: skip
    assert "calibrated for ema,alpha=0.3, and 'max' was named" in said


def test_a_detector_is_taken_over_after_pass_and_stale_only(tmp_path: Path, turned: Path, known: Known) -> None:
    folder = build(tmp_path, known.model, rounded)
    checked(tmp_path, folder, known, 0)
    passed = tmp_path / "report.json"
    run("adopt", known.detector, "--report", passed, "--out", tmp_path / "adopted")
    old, new = Artifact.load(known.detector), Artifact.load(tmp_path / "adopted" / known.detector.name)
    new.require_model(read_model_ref(folder, model_id="new", dtype="float32"))
    assert new.card.tensors_digest == old.card.tensors_digest
    assert [item.format for item in new.card.calibrations] == [Format.CHAT]
    assert new.card.formats == (Format.CHAT,)
    assert new.card.canary is None
    assert new.card.training["adopted"][0]["verdict"] == "PASS"

    report = CheckReport.read(passed)
    stale = report.model_copy(update={"decision": report.decision.model_copy(update={"verdict": Verdict.STALE})})
    stale.write(tmp_path / "stale.json")
    said = run("adopt", known.detector, "--report", tmp_path / "stale.json", "--out", tmp_path / "stale")
    assert "--stage prompt --format chat --aggregate ema,alpha=0.3 --target-fpr 0.01" in said
    assert Artifact.load(tmp_path / "stale" / known.detector.name).card.calibrations == ()

    checked(tmp_path, turned, known, 11)
    assert "DEGRADED" in refused("adopt", known.detector, "--report", passed, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    stale.write(tmp_path / "stale.json")
    assert "another folder" in refused(
        "adopt", known.detector, "--report", tmp_path / "stale.json", "--out", known.detector.parent
    )


def test_what_changed_is_named_field_by_field() -> None:
    old = make_card().model
    new = old.model_copy(update={"weight_digest": "e" * 64, "dtype": "bfloat16", "id": "other"})
    assert [(change.what, change.before, change.after) for change in model_changes(old, new)] == [
        ("weights", "a" * 64, "e" * 64),
        ("dtype", "float32", "bfloat16"),
    ]
    found = library_changes({"torch": "1", "numpy": "2"}, {"torch": "1.1", "numpy": "2", "vllm": "0.32"})
    assert [(change.what, change.before, change.after) for change in found] == [
        ("torch", "1", "1.1"),
        ("vllm", None, "0.32"),
    ]
    assert {"torch", "transformers", "numpy"} <= set(installed_libraries())


def test_help_names_the_exit_codes() -> None:
    said = " ".join(re.sub(r"\s+", " ", run("check", "--help")).split())
    assert "PASS (exit 0), STALE (10), DEGRADED (11) or INCONCLUSIVE (12)" in said
