"""A file of settings for a sparse autoencoder on the tiny model of words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import SourceContext
from probes.taps import Tap
from tests.support.words import WORDS

TAP = Tap(1)


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)  # noqa: S311 - words of a test
    return [" ".join(rng.choices(WORDS, k=rng.randint(12, 40))) for _ in range(count)]


def write_config(folder: Path, **changes: Any) -> Path:
    """A file of settings over random sentences of the tiny model's words; one row has the label 1."""
    rows = [{"text": text, "label": 0} for text in texts(300)] + [{"text": "steal money " * 20, "label": 1}]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    content: dict[str, Any] = {
        "version": "1",
        "name": "tiny",
        "description": "for a test",
        "licence": "Apache-2.0",
        "tap": str(TAP),
        "corpus": {
            "parts": [{"source": {"kind": "jsonl", "path": "texts.jsonl"}, "format": "raw"}],
            "held_out": 0.1,
        },
        "training": {
            "width": 64,
            "activation": {"kind": "batchtopk", "k": 4},
            "epochs": 30,
            "batch_rows": 256,
            "learning_rate": 3e-3,
            "dead_after": 5000,
        },
    }
    path = folder / "tiny.sae.yaml"
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


def context(folder: Path, seed: int = 0) -> SourceContext:
    store = WheelStore(folder=folder / "wheels", progress=lambda _: None)
    return SourceContext(wheels=store, folder=folder, seed=seed)
