"""Detectors that need no labels, from the command's own functions to a score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from probes.artifact import Artifact
from probes.card import Format
from probes.detectors import load_detector
from probes.fit.evaluation.measure import auroc
from probes.fit.rows.example import Example
from probes.fit.training.lens import LensError
from probes.fit.training.making import Making
from probes.fit.training.novelty import NoveltyError
from probes.fit.training.unlabelled import make_lens, make_novelty
from probes.taps import Tap
from tests.support.words import activations_by_hooks


def making(model_dir: Path, folder: Path, layer: int = 1) -> Making:
    return Making(
        model_dir=model_dir,
        model_id="words",
        layer=layer,
        name="made",
        description="by a test",
        out=folder,
        created_by="a test",
        progress=lambda _text: None,
        cache_dir=folder,
    )


def request(text: str) -> Example:
    return Example(text=text, label=0, source="s", group=text)


def test_novelty_of_a_model_that_never_saw_such_words(model_dir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ordinary = [
        request(" ".join(rng.permutation(["please", "bake", "bread", "today", "now", "quickly"]))) for _ in range(60)
    ]
    made = make_novelty(making(model_dir, tmp_path), ordinary, text_formats=[Format.CHAT], components=8)
    loaded = Artifact.load(tmp_path / "made.safetensors")
    assert loaded.card == made.card
    assert loaded.card.canary is not None
    detector = load_detector(loaded)
    means = []
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for words in (["please", "bake", "bread", "now"], ["steal", "money", "alone", "party"]):
        for _ in range(20):
            tokens = tokenizer(" ".join(["<s>", *rng.permutation(words)]))["input_ids"]
            rows = activations_by_hooks(model_dir, tokens)[1][1:]
            means.append(detector.score(detector.read({Tap(1): rows})).mean())
    assert auroc(np.array(means), np.repeat([0, 1], 20)) > 0.95


def test_too_few_requests_are_named(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(NoveltyError, match="rows are there"):
        make_novelty(making(model_dir, tmp_path), [request("bake")], text_formats=[Format.RAW], components=8)


def test_a_lens_has_a_canary_and_its_tokens_on_the_card(model_dir: Path, tmp_path: Path) -> None:
    made = make_lens(making(model_dir, tmp_path, layer=2), tokens=["steal", "money"], contrast=["bake"])
    assert made.card.training["tokens"] == ["steal", "money"]
    assert made.card.canary is not None
    assert len(load_detector(Artifact.load(made.path)).directions()[0].bias) == 3


def test_a_text_of_several_tokens_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(LensError, match="is 2 tokens of this model"):
        make_lens(making(model_dir, tmp_path), tokens=["steal money"], contrast=["bake"])
