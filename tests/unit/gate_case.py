"""What the tests of `telltale gate` share: a tiny model, a detector of it, and its reference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from probes.aggregate import Aggregator
from probes.aggregate.ema import Ema
from probes.artifact import save_artifact, write_card
from probes.card import Format, Stage
from probes.fit.calibration.calibrate import calibrate
from probes.fit.fitters.logistic import Logistic
from probes.fit.reading.activations import ActivationReader
from probes.fit.rows.example import Example
from probes.fit.staleness.check import CheckReport
from probes.fit.training.canary import canary_of
from probes.modelref import read_model_ref
from serving.bench.rebuilds import Change, rebuild
from serving.cli import app
from tests.support.words import WORDS, make_word_model
from tests.unit.artifacts import make_card

LAYER = 1
AGGREGATE: Aggregator = Ema(alpha=0.3)
TARGET = 0.01


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


def _detector(home: Path, model_dir: Path) -> Path:
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


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, ["gate", *map(str, words)])
    assert result.exit_code != 0
    return f"{result.output} {result.exception}"


@dataclass(frozen=True)
class Known:
    """What was recorded: files."""

    model: Path
    detector: Path
    data: Path
    reference: Path


def make_known(home: Path) -> Known:
    """A model, its detector, and 900 rows, a quarter of them positive, recorded on it."""
    model_dir = make_word_model(home / "model")
    detector = _detector(home, model_dir)
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
