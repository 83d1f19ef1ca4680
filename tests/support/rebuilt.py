"""New builds of a small Llama: shifted along a direction, or with another chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.bench.rebuilds import Change


def shifted(direction: np.ndarray, size: float) -> Change:
    """Every token's embedding moved along a direction: the stream carries it through all layers."""

    def change(model: Any) -> None:
        step = direction / np.linalg.norm(direction) * size
        model.model.embed_tokens.weight.add_(torch.tensor(step, dtype=torch.float32))

    return change


def retemplated(model_dir: Path, folder: Path, old: str, new: str) -> Path:
    """The same model with another chat template."""
    shutil.copytree(model_dir, folder)
    changed = 0
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and old in path.read_text():
            path.write_text(path.read_text().replace(old, new))
            changed += 1
    assert changed
    return folder
