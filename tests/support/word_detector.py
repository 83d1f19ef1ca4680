"""A detector of one word on the word model, trained on rows of two sources, and rows of a third: for evaluations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probes.aggregate import Aggregator
from probes.aggregate.mean import Mean
from probes.artifact import Artifact, save_artifact
from probes.card import Card, Format, Stage
from probes.fit.calibration.calibrate import calibrate
from probes.fit.calibration.platt import fit_platt
from probes.fit.evaluation.baselines import labels_of
from probes.fit.fitters.logistic import Logistic
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.scores import read_scores, statistics_of_requests
from probes.fit.rows.example import Example, data_digest
from probes.fit.sources.jsonl import read_jsonl
from probes.fit.training.ensemble import SideBySide, ensemble_tensors
from probes.modelref import read_model_ref
from probes.taps import Tap
from tests.support.words import WORDS

WORD = "steal"
TAP = Tap(1)
TARGET_FPR = 0.05


@dataclass(frozen=True)
class WordDetector:
    """The artifact, and the files that it was trained on and is to be measured on."""

    artifact: Artifact
    train: Path
    data: Path


def write_rows(path: Path, sources: list[str], count: int, seed: int, *, replies: bool) -> Path:
    """Every third row of each source holds the word: in the text, or in the reply, whose onset is then marked."""
    generator = np.random.default_rng(seed)
    plain = [word for word in WORDS if word != WORD]
    lines = []
    for source in sources:
        for i in range(count):
            words = list(generator.choice(plain, int(generator.integers(6, 14))))
            row: dict[str, Any] = {"label": int(i % 3 == 0), "source": source, "lang": "en" if i % 2 else "de"}
            if row["label"]:
                words[int(generator.integers(2, len(words)))] = WORD
            text = " ".join(words)
            if replies:
                row |= {"prompt": " ".join(generator.choice(plain, 5)), "response": text}
                if row["label"]:
                    row["onset"] = text.index(WORD)
            else:
                row["text"] = text
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def make_word_detector(
    model_dir: Path, folder: Path, stage: Stage, aggregate: Aggregator, *, taps: tuple[Tap, ...] = (TAP,)
) -> WordDetector:
    """Fit, calibrate and save it, as training does; its card has Platt scaling at the stage prompt.

    On several taps it is an ensemble; for the aggregate ``attention``, a probe of one head that looks where its score
    is high.
    """
    replies = stage is not Stage.PROMPT
    train = write_rows(folder / "train.jsonl", ["forum", "manual"], 90, 0, replies=replies)
    data = write_rows(folder / "data.jsonl", ["elsewhere", "tickets"], 75, 1, replies=replies)
    benign = [
        row for row in read_jsonl(write_rows(folder / "b.jsonl", ["b"], 300, 2, replies=replies)) if not row.label
    ]
    model = read_model_ref(model_dir, model_id=str(model_dir), dtype="float32", cache_dir=folder)
    layers = [tap.layer for tap in taps]
    reader = ActivationReader(model_dir, model=model, layers=layers, cache_dir=folder, progress=lambda _: None)
    rows = read_jsonl(train)
    pooled = aggregate if stage is Stage.PROMPT and aggregate.channels == 1 else Mean()
    fitter = Logistic(inverse_penalty=0.1)
    whole = fitter if len(taps) == 1 else SideBySide(member=fitter, taps=len(taps))
    read = reader.read(rows, text_format=Format.CHAT, aggregates=[pooled], skip_first=1, label="t", stage=stage)
    probe = whole.fit(read.side_by_side(layers, pooled), labels_of(rows))
    kind, tensors = "linear", probe.tensors()
    if len(taps) > 1:
        kind, tensors = "ensemble", ensemble_tensors(probe, len(taps))
    elif aggregate.channels > 1:
        kind = "attention"
        tensors |= {"query": probe.direction[None], "value": probe.direction[None]}
        del tensors["direction"]
    card = Card(
        name="stealing",
        kind=kind,
        description="Mentions stealing.",
        model=model,
        taps=tuple(str(tap) for tap in taps),
        formats=(Format.CHAT,),
        skip_first=1,
        tensors_digest="0" * 64,
        training={
            "chosen": {"fitter": fitter.config()},
            "layers": [[0, "mean", str(fitter), 0.8], [1, "mean", str(fitter), 0.97]],
            "data_digests": {"train": data_digest(rows)},
        },
        evaluation={"chat": {"kept": True}},
    )
    artifact = save_artifact(folder / "stealing.safetensors", card, tensors)

    def statistics(examples: list[Example]) -> np.ndarray:
        (found,) = read_scores(
            [artifact], examples, reader, text_format=Format.CHAT, stage=stage, cache_dir=folder, label="x"
        )
        return statistics_of_requests(aggregate, stage, found)

    calibration = calibrate(
        statistics(benign),
        benign,
        stage=stage,
        text_format=Format.CHAT,
        aggregate=aggregate,
        target_fpr=TARGET_FPR,
        confidence=0.95,
    )
    if stage is Stage.PROMPT:
        calibration = calibration.model_copy(update={"platt": fit_platt(statistics(rows), rows)})
    calibrated = artifact.card.model_copy(update={"calibrations": (calibration,)})
    return WordDetector(save_artifact(artifact.path, calibrated, tensors), train, data)
