"""What `telltale gate` refuses, what it takes over, and activations that the engine has collected."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from probes.artifact import Artifact, save_artifact, sha256_file
from probes.card import Format, Stage
from probes.fit.reading.activation_manifest import TokenPositions
from probes.fit.reading.activation_store import RequestRecord
from probes.fit.reading.activation_writer import ActivationWriter, PreparedRequest, ShardBuffer, shards_of
from probes.fit.staleness.changes import installed_libraries, library_changes, model_changes
from probes.fit.staleness.check import CheckReport
from probes.fit.staleness.decision import Verdict
from probes.fit.staleness.reference import Reference
from probes.fit.staleness.rows import read_rows
from probes.modelref import read_model_ref
from probes.taps import Tap
from serving.bench.rebuilds import rebuild, rotated, rounded
from tests.unit.artifacts import make_card
from tests.unit.collected import settings
from tests.unit.gate_case import (
    LAYER,
    Known,
    build,
    checked,
    examples,
    make_known,
    reader_of,
    refused,
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


def collect(folder: Path, model: Path, data: Path, *, layer: int = LAYER) -> Path:
    """A folder as `telltale collect --positions all --format chat` leaves it, computed by transformers."""
    reader = reader_of(model, folder.parent)
    requests = reader.render(read_rows(data).examples, text_format=Format.CHAT, stage=Stage.PROMPT)
    made = [
        PreparedRequest(
            RequestRecord(line=line, num_prompt=len(request.tokens), num_tokens=len(request.tokens), fields={}),
            request.tokens, np.zeros(len(request.tokens), dtype=np.uint8), 0, len(request.tokens),
        )
        for line, request in enumerate(requests, 1)
    ]  # fmt: skip
    tap = Tap(layer)
    chosen = settings(
        len(made), model=reader.model, taps=(str(tap),), positions=TokenPositions.ALL, input_digest=sha256_file(data),
        shard_tokens=4000, shard_bytes=1 << 24,
    )  # fmt: skip
    found = dict(reader.sweep(requests, [tap], label="rows"))
    done = 0
    with ActivationWriter(folder, chosen, roles={"user": 4}) as writer:
        for batch in shards_of(made, chosen):
            buffer = ShardBuffer(batch, chosen)
            buffer.activations[str(tap)][:] = np.concatenate([found[done + i][tap] for i in range(len(batch))])
            writer.write(buffer, sinks=0)
            done += len(batch)
        writer.finish()
    return folder


def test_collected_activations_give_the_verdict_that_the_model_gives(
    tmp_path: Path, turned: Path, known: Known
) -> None:
    same, other = (collect(tmp_path / model.name, model, known.data) for model in (known.model, turned))
    out = tmp_path / "reference.json"
    run("record", known.detector, "--data", known.data, "--activations", same, "--out", out)
    mine, theirs = Reference.read(out), Reference.read(known.reference)
    np.testing.assert_allclose(np.array(mine.statistics), np.array(theirs.statistics), atol=1e-4)
    assert mine.tokens == theirs.tokens
    assert mine.model.weight_digest == theirs.model.weight_digest
    assert "telltale collect" in mine.read_by
    report = tmp_path / "report.json"
    words = ("--reference", out, "--data", known.data, "--out", report)
    run("check", known.detector, *words, "--activations", other, code=11)
    found = CheckReport.read(report)
    expected = checked(tmp_path, turned, known, 11)
    assert found.comparison.ranking is not None
    assert expected.comparison.ranking is not None
    assert found.comparison.ranking.auroc_after == pytest.approx(expected.comparison.ranking.auroc_after, abs=0.01)
    assert found.changes == expected.changes


def test_collected_activations_of_something_else_are_refused(tmp_path: Path, turned: Path, known: Known) -> None:
    folder = collect(tmp_path / "folder", known.model, known.data)
    record = ("record", known.detector, "--out", tmp_path / "r.json", "--activations")
    other = written(tmp_path / "other.jsonl", examples(900, 9, 0.25))
    assert "another file" in refused(*record, folder, "--data", other)
    assert "as chat, positions all" in refused(*record, folder, "--data", known.data, "--format", "raw")
    elsewhere = collect(tmp_path / "elsewhere", known.model, known.data, layer=0)
    assert "was not collected" in refused(*record, elsewhere, "--data", known.data)
    assert "does not fit" in refused(*record, collect(tmp_path / "new", turned, known.data), "--data", known.data)
    check = ("check", known.detector, "--reference", known.reference, "--data", known.data)
    assert "one of them" in refused(*check)
    assert "one of them" in refused(*check, "--activations", folder, "--model", turned)


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


def test_a_wrong_use_ends_with_two_like_every_command(tmp_path: Path, known: Known) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serving.cli", "gate", "check", str(known.detector), "--data", str(known.data),
         "--reference", str(tmp_path / "none.json"), "--model", str(known.model)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "none.json: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


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
